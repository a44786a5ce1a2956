"""`pairmill completion`: what a shell needs to complete commands, configurations and keys."""

from __future__ import annotations

import argparse

SUMMARY = "Print what makes a shell complete pairmill's commands, configurations and keys."
EPILOG = """examples:
  eval "$(pairmill completion bash)"                   in ~/.bashrc
  eval "$(pairmill completion zsh)"                    in ~/.zshrc, behind compinit
  pairmill completion fish | source                    in ~/.config/fish/config.fish

Then `pairmill pretrain demo/pre<TAB>`, `pairmill pretrain demo/pretrain optimizer.<TAB>`."""
SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read it")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["pairmill"], shell=options.shell))
    return 0

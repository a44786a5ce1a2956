"""Command line of the glyph pool."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from configs.errors import PairmillError
from tools.glyph_pool.pool import make_pool

_DESCRIPTION = """\
Make a pool of real image-text pairs without a download: the glyphs of the fonts that
matplotlib ships, each with its Unicode name as caption.

OUT/train          about 35,000 pairs as WebDataset tars in img2dataset's layout
OUT/eval/...       held-out evaluation datasets: serif, serif-letters-digits, unseen
OUT/metadata.txt   the words of all Unicode names: entries for MetaCLIP balancing
OUT/pool.json      what was made; where it is there already, nothing is done

As on the web, not every pair is good: 3 % of the pictures are thumbnails of 12 to 19 pixels,
2 % of the captions are only a code ("U+0041"), and many drawings come in several fonts."""

_EPILOG = """\
examples:
  python -m tools.glyph_pool runs/pool
  python -m tools.glyph_pool runs/small --limit 2000
  python -m tools.glyph_pool runs/control --shuffle-captions"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.glyph_pool",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="at most N training pairs: letters and digits first, then characters by hash",
    )
    parser.add_argument(
        "--shuffle-captions",
        action="store_true",
        help="permute the training captions: a control from which nothing can be learnt",
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes; does not change the result"
    )
    options = parser.parse_args(arguments)
    try:
        pool = make_pool(
            options.out,
            limit=options.limit,
            shuffle_captions=options.shuffle_captions,
            num_workers=options.workers,
        )
    except PairmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"error: the pool could not be written to {options.out}: {error}. Nothing is left "
            "there half done: free some space, or give a folder that you may write to.",
            file=sys.stderr,
        )
        return 1
    print(json.dumps(pool, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

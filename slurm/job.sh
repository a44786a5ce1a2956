# What the sbatch scripts here have in common; they source it. Not a job by itself.
# shellcheck shell=bash
#
# Of the environment, for every script:
#   PAIRMILL_PYTHON      the Python that has pairmill (python3)
#   PAIRMILL_SETUP       a file that is sourced first: `module load ...`, `source .venv/bin/activate`
#   PAIRMILL_SRUN        more options of srun, such as --container-image=... (words, no quoting)
#   PAIRMILL_PREFIX      words before Python, such as `apptainer exec --nv image.sif`
#   PAIRMILL_PREFLIGHT   off: do not check the nodes first
#   PAIRMILL_MAX_REQUEUES (100)
#   PAIRMILL_RECORD      the folder in which `pairmill submit` keeps what it knows of this job
#   MASTER_ADDR, MASTER_PORT: of the first node, where the choice below does not fit

set -u
# shellcheck source=/dev/null
[[ -z ${PAIRMILL_SETUP:-} ]] || source "$PAIRMILL_SETUP"
python=${PAIRMILL_PYTHON:-python3}
start=$((${SLURM_RESTART_COUNT:-0} + 1))
max_requeues=${PAIRMILL_MAX_REQUEUES:-100}
read -ra srun_options <<<"${PAIRMILL_SRUN:-}"
read -ra prefix <<<"${PAIRMILL_PREFIX:-}"
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
asked=''  # the signal that this script got
steps=()  # process ids of the sruns that a signal is for
code=0    # exit code of the last step

say() { echo "$(date '+%F %T') $SLURM_JOB_NAME $SLURM_JOB_ID, start $start: $*"; }

note() {
    say "$*"
    [[ -z ${PAIRMILL_RECORD:-} ]] || echo "$(date '+%FT%T%:z') $SLURM_JOB_ID $start $*" >>"$PAIRMILL_RECORD/events"
}

# The first node's IP address: Slurm's own for it, else what its name means here (which may be nothing, or the
# loopback), else the first that this machine has: batch scripts run on the first node.
choose_address() {
    local address
    address=$(scontrol show node "$first_node" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
    [[ $address =~ ^[0-9.]+$ ]] || address=$(getent ahostsv4 "$address" | awk '$1 !~ /^127\./ {print $1; exit}')
    export MASTER_ADDR=${MASTER_ADDR:-${address:-$(hostname -I | awk '{print $1}')}}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
}

# Start Python as a step in the background: begin [OPTION OF SRUN ...] -- WORDS. Its process id is $!.
# The number of CPUs is said again, as srun does not take it from sbatch in Slurm 22.05 to 23.02.
begin() {
    local options=()
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${options[@]+"${options[@]}"} \
        ${srun_options[@]+"${srun_options[@]}"} ${prefix[@]+"${prefix[@]}"} "$python" "$@" &
}

# Wait for a process id; set $code. A trapped signal ends bash's `wait` with a code of its own: wait again, unless the
# process had just ended, when bash knows it no longer (127).
await() {
    local status
    code=127
    while true; do
        interrupted=''
        status=0
        wait "$1" || status=$?
        ((status == 127)) || code=$status
        [[ -n $interrupted ]] || return 0
    done
}

# Run Python as a step on every node: hand signals on, set $code.
run() {
    begin --kill-on-bad-exit=1 -- "$@"
    steps=($!)
    await "${steps[0]}"
    steps=()
}

hand_on() { # SIGNAL FOR_THE_STEPS
    asked=$1 interrupted=yes
    say "got SIG$1"
    local step
    for step in ${steps[@]+"${steps[@]}"}; do kill -s "$2" "$step" 2>/dev/null; done
}

# shellcheck disable=SC2034 # checked: for the script
preflight() { # MODULE CONFIG...
    checked=''
    [[ ${PAIRMILL_PREFLIGHT:-on} != off ]] || return 0
    run -m slurm.preflight --import="$1" "${@:2}"
    ((code == 0)) || [[ -n $asked ]] || end 1 "failed in preflight"
    checked=yes
}

end() { # EXIT_CODE WHAT HAPPENED
    note "${@:2}"
    exit "$1"
}

# End a job that can go on later: requeued where Slurm asked by USR1 (the time limit) or the job itself wishes
# it. After TERM (scancel, preemption) Slurm itself decides what becomes of the job.
end_to_go_on() { # WHAT HAPPENED
    [[ $asked != TERM ]] || end 75 "$*; ended by Slurm, which requeues it where that was a preemption"
    ((start <= max_requeues)) || end 75 "$*; not requeued, as all PAIRMILL_MAX_REQUEUES=$max_requeues are used up: the same line goes on"
    note "$*; requeued"
    scontrol requeue "$SLURM_JOB_ID" || end 75 "scontrol could not requeue it: the same line goes on"
    exit 0 # Slurm ends this script anyway
}

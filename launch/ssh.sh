#!/usr/bin/env bash
# Start a run on several machines by ssh, watch it, and stop all of it when one machine fails.
#
#   launch/ssh.sh HOST[,HOST...] [flags of train.py]
#   launch/ssh.sh anna,berta,user@10.0.0.3 --dataset-path data/prepared/x --output-dir artifacts/x
#
# Every machine needs the project at the same path, and ssh has to get there without a password.
# Ctrl-C stops all machines: train.py saves before it ends. What you can set in the environment:
#   MAIN_ADDR   address of the first host, as the others reach it      [the host's name]
#   PORT        a free port there                                       [29500]
#   PROCESSES   on each machine: 1, or the number of its GPUs           [1]
#   FOLDER      of the project, on all machines                         [this one]
#   PYTHON      in that folder                                          [.venv/bin/python]
#   SCRIPT      train.py, check_cluster.py, prepare_data.py             [train.py]
#   SSH         ssh and its options                                     [ssh]
# Needs bash 4.3 or newer on this machine. Exit status: 0, or that of the first machine that failed.
set -euo pipefail

(($# >= 1)) || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | head -n -1; exit 2; }
IFS=, read -ra hosts <<<"$1"
shift
port=${PORT:-29500} processes=${PROCESSES:-1} script=${SCRIPT:-train.py}
folder=${FOLDER:-$(cd "$(dirname "$0")/.." && pwd)}
main=${MAIN_ADDR:-${hosts[0]#*@}}
read -ra ssh <<<"${SSH:-ssh}"
ssh+=(-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3)

# On each machine: run the command until it ends, or until standard input does. That is the sign to
# stop, and it also comes when the connection is lost. A shell may say how a job that it waits for
# was ended: of the command that is news, of the guard it is not.
# shellcheck disable=SC2016  # expanded there, not here
there='cd "$1" || exit 2; shift; exec 3<&0; "$@" </dev/null & run=$!
{ read -r _ <&3; sleep 60 & nap=$!; trap "kill $nap; exit" TERM; kill -TERM $run; wait $nap
  kill -KILL $run; } >/dev/null 2>&1 & guard=$!
wait $run; status=$?; kill $guard 2>/dev/null; wait $guard 2>/dev/null; exit $status'

# One word for the shell there, whatever it holds: newlines, quotes, bytes of any encoding. Not
# printf %q, whose $'...' only bash and zsh read.
quoted() { local quote="'\\''"; printf "'%s' " "${1//\'/$quote}"; }

# As long as this script keeps the pipe open, nobody's standard input ends.
pipe=$(mktemp -u) && mkfifo "$pipe" && exec 9<>"$pipe"
trap 'rm -f "$pipe"' EXIT
stop() { exec 9>&-; }
trap 'status=130; echo "stopping all machines" >&2; stop' INT TERM HUP

status=0
for rank in "${!hosts[@]}"; do
    if ((processes == 1)); then
        command=("${PYTHON:-.venv/bin/python}" "$script" --rank "$rank" --world-size "${#hosts[@]}"
            --master-addr "$main" --master-port "$port")
    else
        command=("${PYTHON:-.venv/bin/python}" -m torch.distributed.run --node-rank "$rank"
            --nnodes "${#hosts[@]}" --nproc-per-node "$processes" --master-addr "$main"
            --master-port "$port" "$script")
    fi
    words=$(for word in "$folder" "${command[@]}" "$@"; do quoted "$word"; done)
    # Ctrl-C reaches all that the terminal has started. What shows the last words must outlive it.
    (
        trap '' INT HUP
        exec <"$pipe" 9>&-
        "${ssh[@]}" "${hosts[rank]}" "sh -c '$there' forge $words" 2>&1 |
            sed -u "s/^/[${hosts[rank]}] /"
    ) &
done

while [[ -n $(jobs -p) ]]; do
    ended=0
    wait -n || ended=$?
    if ((ended && !status)); then
        status=$ended
        echo "a machine ended with status $ended: stopping the others" >&2
        stop
    fi
done
exit "$status"

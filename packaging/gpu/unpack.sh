# Unpack what `make gpu-pack` and `make gpu-pack-model` packed, once, and set the environment for it.
# Sourced from the repository's root:  . .gpu/unpack.sh
# TRITON_CACHE_DIR must be the path under which the cache was filled: its files name each other by it.
site=/tmp/infoquant-site
export TRITON_CACHE_DIR=/tmp/infoquant-triton VLLM_CACHE_ROOT=/tmp/infoquant-vllm
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1

extract='import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="fully_trusted")'
unpack() {  # FOLDER MARK FILE...: files that are one archive together
    local folder=$1 mark=$1/.$2
    shift 2
    [ -e "$1" ] && [ ! -e "$mark" ] || return 0
    mkdir -p "$folder" && cat "$@" | python3 -c "$extract" "$folder" && touch "$mark"
}
for part in deps vllm ext; do unpack $site "$part" ".gpu/$part.tar.xz" & done
unpack "$TRITON_CACHE_DIR" triton .gpu/triton.tar.xz &
set -- .gpu-model/model.*of*
[ $# != "${1##*of}" ] || unpack /tmp/infoquant-model model "$@" &
wait

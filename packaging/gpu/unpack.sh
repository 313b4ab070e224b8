# Unpack what `make gpu-pack` and `make gpu-pack-model` packed, once, and set the environment for it.
# Sourced from the repository's root:  . .gpu/unpack.sh
site=/tmp/infoquant-site
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 VLLM_CACHE_ROOT=/tmp/infoquant-vllm

extract='import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1])'
unpack() {  # FOLDER MARK FILE...: the files are one archive together
    local folder=$1 mark=$1/.$2
    shift 2
    [ -e "$1" ] && [ ! -e "$mark" ] || return 0
    mkdir -p "$folder" && cat "$@" | python3 -W ignore -c "$extract" "$folder" && touch "$mark"
}
for part in deps vllm ext; do unpack $site "$part" ".gpu/$part.tar.xz" & done
model=(.gpu-model/model.*of*)
[ ${#model[@]} != "${model[0]##*of}" ] || unpack /tmp/infoquant-model model "${model[@]}" &
wait

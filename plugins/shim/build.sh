#!/bin/sh
# Build the CNI executables: build.sh [native|amd64|arm64|lint]...   (default: native; lint only looks for mistakes)
# native goes to build/cni/, the others to build/cni-<architecture>/. A target newer than its source is left alone.
set -eu
cd "$(dirname "$0")/../.."
source=plugins/shim/spiderpool.c
flags="-std=gnu11 -static -Os -s -Wall -Wextra -Werror"
python=build/venv/bin/python
[ -x "$python" ] || python=python3
export ZIG_GLOBAL_CACHE_DIR="$PWD/build/zig-cache" ZIG_LOCAL_CACHE_DIR="$PWD/build/zig-cache"

for target in "${@:-native}"; do
	case $target in
	lint)
		# shellcheck disable=SC2086 # a list of words
		musl-gcc $flags -O2 -Wshadow -Wconversion -Wstrict-prototypes -Wvla -fanalyzer -c -o /dev/null "$source"
		continue ;;
	native) dir=build/cni compiler="musl-gcc" ;;
	amd64) dir=build/cni-amd64 compiler="$python -m ziglang cc -target x86_64-linux-musl" ;;
	arm64) dir=build/cni-arm64 compiler="$python -m ziglang cc -target aarch64-linux-musl" ;;
	*) echo "$0: unknown target '$target'; choose native, amd64 or arm64" >&2; exit 2 ;;
	esac
	if [ -e "$dir/vlan" ] && [ -z "$(find "$source" "$0" -newer "$dir/vlan" 2>/dev/null)" ]; then
		continue
	fi
	mkdir -p "$dir"
	# shellcheck disable=SC2086 # both are lists of words
	$compiler $flags -o "$dir/.spiderpool.$$" "$source"
	mv "$dir/.spiderpool.$$" "$dir/spiderpool"
	for name in coordinator ifacer vlan; do
		ln -f "$dir/spiderpool" "$dir/$name"
	done
done

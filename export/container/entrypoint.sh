#!/bin/sh
# Entry point of the container: `serve` starts sr-serve; `warm` and sr-upscale's options have the engine for 8-bit
# pictures built and kept, which enlarging any picture does; everything else goes to sr-upscale as it is.
set -eu
if [ "${1-}" = serve ]; then
    shift
    exec sr-serve --host 0.0.0.0 --state /state "$@"
fi
if [ "${1-}" = warm ]; then
    shift
    folder=$(mktemp -d)
    { printf 'P6 64 64 255\n' && head -c 12288 /dev/zero; } >"$folder/black.ppm"
    set -- "$folder/black.ppm" -o "$folder/large.png" --verbose "$@"
    case ",${SR_EXTRAS-}," in *,tensorrt,*) set -- --backend tensorrt "$@" ;; esac # nothing else keeps engines
fi
exec sr-upscale "$@" # in this process, which gets the signals

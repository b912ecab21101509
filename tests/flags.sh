#!/bin/sh
# Options that let a compiler change the bits of results are refused: when it compiles, where it tells that they are given
# (gcc tells all but -ffp-contract, which a pragma undoes; clang tells two, and pragmas undo a part of the others), or
# when the program starts.
#     sh tests/flags.sh [COMPILER]       in the repository's root
set -eu
compiler=${1:-cc}
refused="-ffast-math -Ofast -ffinite-math-only"
if ! $compiler -dM -E - </dev/null | grep -q __clang__; then
    refused="$refused -funsafe-math-optimizations -freciprocal-math -fno-signed-zeros -fsingle-precision-constant
        -fassociative-math,-fno-signed-zeros,-fno-trapping-math"
    if $compiler -dM -E - </dev/null | grep -q __x86_64__; then refused="$refused -mfpmath=387"; fi
fi
said=$($compiler -E run.c 2>&1 >/dev/null) || { echo "$compiler: $said"; exit 1; }
for option in $refused; do
    option=$(echo "$option" | tr , ' ')
    if said=$($compiler $option -E run.c 2>&1 >/dev/null); then echo "$compiler $option: not refused"; exit 1; fi
    case $said in *"cria promises the same bits"*) ;; *) echo "$compiler $option: $said"; exit 1 ;; esac
done
# What no macro tells is told by the first sums that the program makes.
if [ "$compiler" = clang ]; then
    program=$(mktemp)
    trap 'rm -f "$program"' EXIT
    for option in -freciprocal-math -ffp-contract=fast -fassociative-math,-fno-signed-zeros,-fno-trapping-math; do
        $compiler -O2 $(echo "$option" | tr , ' ') -w -pthread run.c -lm -o "$program"
        case $option in -fr*) wanted="no story.gguf: No such file" ;; *) wanted="promises the same bits" ;; esac
        for kernel in $("$program" -m matmul --kernel none 2>&1 | sed -n 's/.*has //p' | tr -d ,); do
            said=$("$program" "no story.gguf" --kernel "$kernel" 2>&1) || true
            case $said in *"$wanted"*) ;; *) echo "$compiler $option, kernel $kernel: $said"; exit 1 ;; esac
        done
    done
fi
echo "flags: ok"

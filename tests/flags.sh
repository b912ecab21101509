#!/bin/sh
# Options that let a compiler change the bits of results are refused, as far as it tells that they are given (gcc tells
# all but -ffp-contract, which a pragma undoes; clang tells two, and pragmas undo a part of the others).
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
echo "flags: ok"

#!/bin/sh
# Follows the recipes of run.c, those beside its tables, to the letter, on a copy of the sources; then runs the result.
# A line that a recipe adds to is found by its text: where the source no longer fits, this fails, and so does who reads it.
#     sh tests/recipes.sh [COMPILER]       in the repository's root; a C compiler is all it needs (four seconds)
set -eu
compiler=${1:-cc}
here=build/recipes
rm -rf $here
mkdir -p $here
cp run.c tokenizer.c README.md tests/recipes.c $here

# In file $1, where line $2 (a pattern) is there once, from $3 (a pattern; "" if from the beginning) on: puts $5 before it
# or after it, as $4 says.
add() {
    LC_ALL=C awk -v line="$2" -v from="$3" -v where="$4" -v new="$5" '
        from == "" || $0 ~ from { on = 1 }
        on && !done && $0 ~ line { done = 1; print where == "before" ? new "\n" $0 : $0 "\n" new; next }
        { print }
        END { if (!done) { print "no line " line " after " from > "/dev/stderr"; exit 1 } }' $here/"$1" >$here/new
    mv $here/new $here/"$1"
}
recipe() { grep -q "^// $1" run.c || { echo "run.c has no recipe \"$1\""; exit 1; }; }

recipe "To add a type: its name in the enum of chapter 3, a row here"
sed -i.old 's/MXFP4, N_TYPES$/MXFP4, Q3, N_TYPES/' $here/run.c
add run.c '^};' '^static const TypeInfo types.N_TYPES. = ' before \
    '    [Q3] = { "q3", .cols = 32, .per_scale = 32, .header = 32, .bits = 3, .offset = 4 },'
add run.c '^};' '^static const SourceType source_types' before \
    '    { "Q3_0", 99, 32, 14, Q3, pack_blocks, .scale_at = 0, .low = { 2, 8 }, .high = { 10, 4 } },'
if $compiler -O0 -fsyntax-only $here/run.c 2>$here/said; then echo "a type without its case compiles"; exit 1; fi
grep -q "Q3.*not handled in switch" $here/said
add run.c '^        FOR_TYPE' '^INLINE void add_byte_tiles' before '        FOR_TYPE(Q3)'

recipe "A family of models. To add one: a row in families"
add run.c '^};' '^static const Family families' before '    { "newer", HALVES, PRE_NORMS | BIASES, 0, 0, 0 },'

recipe "To add an option: a member of Options, a row here, a line in README"
add run.c '^} Options;' '' before '    bool whisper;'
add run.c '^};' '^static const Option option_table' before \
    '    { 0, "whisper", NULL, FLAG, OF(whisper), 0, 0, "says less" },'
add README.md '^ *--version ' '' before '          --whisper            says less'

recipe "To add a set of kernels: its leaves and MAKE_KERNELS() below, its place in all_kernels"
add run.c '^static const Kernels .const all_kernels' '' before \
    'MAKE_KERNELS(another, static, "another", add_tiles, add_products, widen_floats, narrow_floats, peak_scalar)'
add run.c '^static const Kernels .const all_kernels' '^#include <arm_neon' before \
    'MAKE_KERNELS(another, static, "another", add_tiles, add_products, widen_floats, narrow_floats, peak_scalar)'
sed -i.old '/^static const Kernels .const all_kernels/s/&scalar };/\&another, &/' $here/run.c
grep -q '^static const Kernels .const all_kernels.*&another, &scalar };' $here/run.c

# To come: a step of a layer, a sampler.

$compiler -O0 -w $here/recipes.c -lm -o $here/run
$here/run type
echo "type: ok"

model=tests/golden/qwen2.gguf
LC_ALL=C sed 's/qwen2\./newer./g; s/\(general\.architecture............\)qwen2/\1newer/' $model >$here/newer.gguf
if cmp -s $model $here/newer.gguf; then echo "$model is not of family qwen2"; exit 1; fi
logits() { $here/run "$1" -q -m logits --ids "$(cat tests/golden/qwen2.ids)" -o "$2" $3; }
logits $model $here/usual ""
logits $here/newer.gguf $here/family ""
cmp $here/usual $here/family
echo "family: ok"

logits $model $here/option --whisper
cmp $here/usual $here/option
[ "$($here/run --help | grep -c -e '--whisper *says less')" = 1 ]
[ "$(grep -c -e '--whisper *says less' $here/README.md)" = 1 ]
echo "option: ok"

logits $model $here/kernels "--kernel another"
cmp $here/usual $here/kernels
echo "kernels: ok"

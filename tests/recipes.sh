#!/bin/sh
# Follows the recipes of run.c, those beside its tables, to the letter, on a copy of the sources; then runs the result.
# A line that a recipe adds to is found by its text: where the source no longer fits, this fails, and so would a reader.
#     sh tests/recipes.sh [COMPILER]       in the repository's root; a C compiler is all it needs (six seconds)
set -eu
compiler=${1:-cc}
here=build/recipes
rm -rf $here
mkdir -p $here
cp run.c tokenizer.c README.md tests/recipes.c $here

# In file $1, puts $5 before or after (as $4 says) the first line that fits the pattern $2; that is, the first from where
# $3 fits on ("": from the beginning).
add() {
    LC_ALL=C awk -v line="$2" -v from="$3" -v where="$4" -v new="$5" '
        from == "" || $0 ~ from { on = 1 }
        on && !done && $0 ~ line { done = 1; print where == "before" ? new "\n" $0 : $0 "\n" new; next }
        { print }
        END { if (!done) { print "no line " line " after " from > "/dev/stderr"; exit 1 } }' $here/"$1" >$here/new
    mv $here/new $here/"$1"
}
recipe() { grep -q "^// .*To add $1" run.c || { echo "run.c has no recipe \"To add $1\""; exit 1; }; }

recipe "a type: its name in the enum of chapter 3, a row here"
sed -i.old 's/MXFP4, N_TYPES$/MXFP4, Q3, N_TYPES/' $here/run.c
add run.c '^};' '^static const TypeInfo types.N_TYPES. = ' before \
    '    [Q3] = { "q3", .cols = 32, .per_scale = 32, .header = 32, .bits = 3, .offset = 4 },'
add run.c '^};' '^static const SourceType source_types' before \
    '    { "Q3_0", 99, 32, 14, Q3, pack_blocks, .scale_at = 0, .low = { 2, 8 }, .high = { 10, 4 } },'
if $compiler -O0 -fsyntax-only $here/run.c 2>$here/said; then echo "a type without its case compiles"; exit 1; fi
grep -q "Q3.*not handled in switch" $here/said
add run.c '^        FOR_TYPE' '^INLINE void add_tiles.float' before '        FOR_TYPE(Q3)'

recipe "\(one\|a family\): a row in families"
add run.c '^};' '^static const Family families' before '    { "newer", HALVES, PRE_NORMS | BIASES, 0, 0, 0 },'

recipe "an option: a member of Options, its default in run(), a row here, a line in README"
add run.c '^} Options;' '' before '    bool whisper;'
add run.c '^};' '^static const Option option_table' before \
    '    { 0, "whisper", NULL, FLAG, OF(whisper), 0, 0, "says less" },'
add README.md '^| .*`--version`' '' before '| `--whisper` | says less | |'

recipe "a set of kernels: its leaves and MAKE_KERNELS() below, its place in all_kernels"
add run.c '^static const Kernels .const all_kernels' '' before \
    'MAKE_KERNELS(another, static, "another", add_products, narrow_floats, peak_scalar, PLAIN_LEAVES)'
add run.c '^static const Kernels .const all_kernels' '^#include <arm_neon.h>' before \
    'MAKE_KERNELS(another, static, "another", add_products, narrow_floats, peak_scalar, PLAIN_LEAVES)'
sed -i.old '/^static const Kernels .const all_kernels/s/&scalar };/\&another, &/' $here/run.c
grep -q '^static const Kernels .const all_kernels.*&another, &scalar };' $here/run.c

# It doubles the vectors that the embedding gives, which are halved before: so the logits stay as they are.
recipe "a step: its name here and in step_names\[\] (chapter 13), its work in a loop over take_chunk(), then end_step()"
add run.c '^ *EMBED,$' '' after '    TWICE,'
add run.c '^};' '^static const char .const step_names' before '    [TWICE] = "twice",'
add run.c '^    end_step.team, EMBED, 0.;' '' after '    for (Range r; take_chunk(team, (size_t)w->n, 1, &r);)
        for (size_t i = r.from * w->x_stride; i < r.to * w->x_stride; i++) w->x[i] *= 2;
    end_step(team, TWICE, 0);'
sed -i.old -e 's/ \* m->config\.embedding_scale;$/ * m->config.embedding_scale \/ 2;/' \
    -e 's/)n) < 1000000 ?/)n) < 1 ?/' $here/run.c  # and threads share even little work
[ "$(grep -c -e 'embedding_scale / 2;$' -e ')n) < 1 ?' $here/run.c)" = 2 ]

# It leaves out every token that is less likely than a number.
add run.c '^} Sampler;' '' before '    float epsilon;  // 0 = off'
add run.c '^} Options;' '' before '    double epsilon;'
add run.c '^};' '^static const Option option_table' before \
    '    { 0, "epsilon", "P", REAL, OF(epsilon), 0, 1, "leave out what is less likely than P; 0 = off" },'
add README.md '^| `--min-p`' '' after '| `--epsilon` P | exclude tokens less likely than P; 0: off | 0 |'
sed -i.old -e 's/ = (float)options\.min_p }/ = (float)options.min_p, .epsilon = (float)options.epsilon }/' \
    -e 's/bool cuts = /&s->epsilon > 0.0f || /' $here/run.c
add run.c '^    [*]sum = 0' '^// To add a filter' before '    while (n > 1 && c[n - 1].p < s->epsilon) n--;'

$compiler -O0 -w -pthread run.c -lm -o $here/usual_run
$compiler -O0 -w -pthread $here/recipes.c -lm -o $here/run
$here/run type
echo "type: ok"

model=tests/golden/qwen2.gguf
LC_ALL=C sed 's/qwen2\./newer./g; s/\(general\.architecture............\)qwen2/\1newer/' $model >$here/newer.gguf
if cmp -s $model $here/newer.gguf; then echo "$model is not of family qwen2"; exit 1; fi
ids=$(cat tests/golden/qwen2.ids)
logits() { $here/run "$1" -q -m logits --ids "$ids" -o "$2" $3; }
$here/usual_run $model -q -m logits --ids "$ids" -o $here/usual
logits $here/newer.gguf $here/family ""
cmp $here/usual $here/family
echo "family: ok"

logits $model $here/option --whisper
cmp $here/usual $here/option
[ "$($here/run --help | grep -c -e '--whisper *says less')" = 1 ]
[ "$(grep -c '`--whisper` | says less' $here/README.md)" = 1 ]
echo "option: ok"

logits $model $here/kernels "--kernel another"
cmp $here/usual $here/kernels
echo "kernels: ok"

for threads in 1 2; do
    logits $model $here/step "-j $threads"
    cmp $here/usual $here/step
done
$here/run $model -m bench --pp 5 --tg 3 --reps 1 -j 2 --profile >$here/said 2>&1
[ "$(grep -c '^  twice  *[13] ' $here/said)" = 2 ]  # of the prompt one, of the tokens three
echo "step: ok"

$here/run sampler
$here/run $model -q -n 8 -s 1 -i "a b" --epsilon 0 >$here/sampler
$here/usual_run $model -q -n 8 -s 1 -i "a b" | cmp - $here/sampler
$here/run $model -q -n 8 -t 0 -i "a b" >$here/sampler
$here/run $model -q -n 8 -s 1 -i "a b" -p 0 --epsilon 1 | cmp - $here/sampler
echo "sampler: ok"

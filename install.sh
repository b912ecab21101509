#!/bin/sh
# Makes what is installed beside the program from the output of its --help, which is the option table:
#     sh install.sh man|bash|zsh|fish PROGRAM       prints the man page, or the completion of a shell
set -eu
[ -x "${2:-}" ] || { echo "usage: sh install.sh man|bash|zsh|fish PROGRAM" >&2; exit 2; }
help=$(${EMULATOR:-} "$2" --help)
version=$(${EMULATOR:-} "$2" --version)
# Each option becomes a line: letter, name, argument, help, separated by tabs; each heading a line "#" and its text.
printf '%s\n' "$help" | LC_ALL=C awk -v kind="$1" -v version="$version" '
function roff(text) {
    gsub(/\\/, "\\e", text)
    gsub(/-/, "\\-", text)
    return (text ~ /^[.\047]/ ? "\\&" : "") text
}
function escaped(text, characters,    i, c, out) {
    for (i = 1; i <= length(text); i++) {
        c = substr(text, i, 1)
        out = out (index(characters, c) ? "\\" : "") c
    }
    return out
}
function man_option() {
    printf ".TP\n%s\\fB\\-\\-%s\\fR%s\n%s\n", letter == "" ? "" : "\\fB\\-" letter "\\fR, ", roff(name), \
        argument == "" ? "" : " \\fI" argument "\\fR", roff(text)
}
function zsh_option(    form, value) {
    value = argument == "" ? "" : ":" argument ":" (name == "mode" ? "(" modes ")" : argument == "FILE" ? "_files" : " ")
    form = " \\\n    \"%s[%s]%s\""
    if (letter != "") printf form, "-" letter (argument == "" ? "" : "+"), escaped(text, "\"$`\\[]:"), value
    printf form, "--" name (argument == "" ? "" : "="), escaped(text, "\"$`\\[]:"), value
}
function fish_option() {
    printf "complete -c cria%s -l %s -d \047%s\047", letter == "" ? "" : " -s " letter, name, escaped(text, "\\\047")
    if (name == "mode") printf " -x -a \047%s\047", modes
    else if (argument == "FILE") printf " -r -F"
    else if (argument != "") printf " -x"
    printf "\n"
}
/^  / {
    letter = substr($0, 3, 1) == "-" ? substr($0, 4, 1) : ""
    rest = substr($0, 9)
    at = index(rest, "  ")
    text = substr(rest, at)
    sub(/^ */, "", text)
    n = split(substr(rest, 1, at - 1), words, " ")
    name = words[1]
    argument = n > 1 ? words[2] : ""
    if (name == "mode") { modes = text; gsub(/ \(default\)|,/, "", modes) }
    if (kind == "man") man_option()
    if (kind == "zsh") zsh_option()
    if (kind == "fish") fish_option()
    if (kind == "bash") all = all (letter == "" ? "" : " -" letter) " --" name
    if (argument == "FILE") files = files (letter == "" ? "" : "-" letter "|") "--" name "|"
    next
}
kind == "man" && /:$/ { printf ".SS %s\n", roff(substr($0, 1, length($0) - 1)) }
kind == "man" && /^limits: / { limits = roff(substr($0, 9)) }
/^usage: / {
    if (kind == "man") printf ".TH CRIA 1 \"\" \"%s\"\n.SH NAME\ncria \\- run a language model on the CPU\n" \
        ".SH SYNOPSIS\n.B cria\n.I MODEL\n[\\fIPROMPT\\fR] [options]\n.SH DESCRIPTION\nContinues the prompt with the " \
        "model in a file (GGUF, cria\\(aqs own, or llama2.c\\(aqs), or does what\n.B \\-m\nsays. Without a prompt, it is read " \
        "from standard input, unless that is a terminal. The text goes to standard output, everything else to " \
        "standard error.\n.SH OPTIONS\n", version
    if (kind == "zsh") printf "#compdef cria\n_arguments -S"
    if (kind == "fish") print "complete -c cria -F"
}
END {
    if (kind == "man") printf ".SH LIMITS\n%s.\n.SH EXIT STATUS\n0 done; 1 a bad file; 2 wrong options; 3 reading or writing " \
        "failed; 4 no memory; 5 the prompt does not fit the context; 130 interrupted.\n.SH EXAMPLES\n.nf\n" \
        "cria model.gguf \"Once upon a time\"\ncria model.gguf \\-m chat\ncat report.txt | cria model.gguf " \
        "\\-i \"Summarise:\" \\-f \\-\n.fi\n", limits
    if (kind == "zsh") printf " \\\n    \"1:MODEL:_files\" \"2:PROMPT: \"\n"
    if (kind == "bash") printf "_cria() {\n    local word=\"${COMP_WORDS[COMP_CWORD]}\" before=\"${COMP_WORDS[COMP_CWORD-1]}\"\n" \
        "    COMPREPLY=()\n    case $before in\n        -m|--mode) COMPREPLY=($(compgen -W \"%s\" -- \"$word\")); return ;;\n" \
        "        %s) return ;;\n    esac\n    [[ $word != -* ]] || COMPREPLY=($(compgen -W \"%s\" -- \"$word\"))\n}\n" \
        "complete -o default -F _cria cria\n", modes, substr(files, 1, length(files) - 1), substr(all, 2)
}'

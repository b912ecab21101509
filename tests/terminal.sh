#!/usr/bin/env bash
# What a chat shows in a terminal, by tmux:   bash tests/terminal.sh [MODEL]
#
# Prints the screens and says what is wrong with them. Expected values are what was typed.
set -u
cd "$(dirname "$0")/.." || exit 1
model=${1:-models/smollm2-135m-instruct.bin}
folder=$(mktemp -d) failed=0
t() { tmux -L "cria$$" "$@"; }
trap 't kill-server 2>/dev/null; rm -rf "$folder"' EXIT
t -f /dev/null new-session -d -x 40 -y 12 "env PS1='$ ' bash --norc -i"

# Waits until the screen, with spaces at the ends of lines and empty lines removed, ends with these lines.
expect() {
    local i screen
    for i in $(seq 100); do
        screen=$(t capture-pane -p | sed 's/ *$//' | sed '/^$/d')
        if [ "$(tail -n "$(wc -l <<<"$1")" <<<"$screen")" = "$1" ]; then
            printf -- '---- %s\n%s\n' "$2" "$screen"
            return
        fi
        sleep 0.1
    done
    printf -- '---- FAILED: %s\n%s\n-- wanted:\n%s\n' "$2" "$screen" "$1"
    failed=1
}
cursor() {
    sleep 0.5
    [ "$(t display-message -p '#{cursor_x},#{cursor_y}')" = "$1" ] || { echo "FAILED: the cursor, wanted $1"; failed=1; }
}
keys() { t send-keys "$@"; }

keys "clear; ./run $model -m chat -q -t 0 -n 0 -j 1 --log $folder/log" Enter
expect ">" "the first prompt"
keys "a世界b" Left Left Left "x😀" Home "é" End "!"
expect "> éax😀世界b!" "editing between wide characters"
keys Left Left Left
cursor 9,0
keys C-c
expect $'> éax😀世界b!^C\n>' "Ctrl-C clears a line"
keys "0123456789012345678901234567890123456789ab"
expect $'> 01234567890123456789012345678901234567\n89ab' "a long line"
t resize-window -x 20 -y 12
expect $'> 012345678901234567\n89012345678901234567\n89ab' "a narrower window"
t resize-window -x 60 -y 12
expect "> 0123456789012345678901234567890123456789ab" "a wider window"
keys C-u "one" Enter
expect $'> one\n>' "a message"
keys Up " two" C-a "z" Enter
expect $'> zone two\n>' "history"
seq -f 'line %g of what is pasted' 1 800 >"$folder/page"
t load-buffer "$folder/page"
t paste-buffer -p
expect $'line 799 of what is pasted\nline 800 of what is pasted' "a paste of 20 KB"
keys C-u "/undo" Enter "/save $folder/chat.json" Enter "/clear" Enter "/tokens" Enter
expect $'[0 tokens of 4096]\n>' "/clear"
keys "/load $folder/chat.json" Enter "/regen" Enter "/save $folder/again.json" Enter C-z
sleep 1
keys "echo stopped" Enter "fg" Enter
sleep 1
keys "three" C-w "four" Enter
expect $'> four\n>' "after Ctrl-Z and fg"
keys C-d
sleep 1
keys "echo status \$?" Enter
expect $'$ echo status $?\nstatus 0\n$' "Ctrl-D"
cmp "$folder/chat.json" "$folder/again.json" || failed=1
printf '{"messages": [\n  {"role": "user", "content": "one"},\n  {"role": "assistant", "content": ""}\n]}\n' |
    cmp - "$folder/chat.json" || failed=1
grep -c '^user: ' "$folder/log" | grep -qx 3 || { echo "FAILED: the log has other messages"; cat "$folder/log"; failed=1; }
exit $failed

#!/bin/sh
# No library and no language but the shell: curl asks, the shell adds.
#
#   sh agent.sh "What is 12 plus 30?"
set -eu

question=$(printf '%s' "$1" | sed 's/\\/\\\\/g; s/"/\\"/g')
system='{"role": "system", "content": "Use the calculator, then say the result."}'
user="{\"role\": \"user\", \"content\": \"$question\"}"
tools='[{"type": "function", "function": {"name": "add",
  "description": "Adds two whole numbers.",
  "parameters": {"type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"], "additionalProperties": false}}}]'

ask() {
  curl -sS --fail-with-body --max-time 120 "$OPENAI_BASE_URL/chat/completions" \
    -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" \
    -d "{\"model\": \"gpt-4o-mini\", \"tools\": $tools, $1}"
}

# A number among the arguments of a tool call, which are JSON inside of a JSON string.
argument() {
  printf '%s' "$2" | sed -n "s/.*\\\\\"$1\\\\\": *\(-\{0,1\}[0-9]*\).*/\1/p"
}

reply=$(ask "\"max_tokens\": 200, \"tool_choice\": \"required\", \"parallel_tool_calls\": false,
  \"messages\": [$system, $user]")
a=$(argument a "$reply")
b=$(argument b "$reply")
sum=$((${a:-0} + ${b:-0}))

call="{\"id\": \"call_1\", \"type\": \"function\",
  \"function\": {\"name\": \"add\", \"arguments\": \"{\\\"a\\\": ${a:-0}, \\\"b\\\": ${b:-0}}\"}}"
reply=$(ask "\"max_tokens\": 100, \"messages\": [$system, $user,
  {\"role\": \"assistant\", \"tool_calls\": [$call]},
  {\"role\": \"tool\", \"tool_call_id\": \"call_1\", \"content\": \"$sum\"}]")
printf '%s\n' "$reply" | sed 's/.*"content": *"\(\([^"\\]\|\\.\)*\)".*/\1/'

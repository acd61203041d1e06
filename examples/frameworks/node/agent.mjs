// The openai package on Node: the model calls a tool, then says the result.
//
//   node agent.mjs "What is 12 plus 30?"
import OpenAI from "openai";

const add = {
  type: "function",
  function: {
    name: "add",
    description: "Adds two whole numbers.",
    parameters: {
      type: "object",
      properties: { a: { type: "integer" }, b: { type: "integer" } },
      required: ["a", "b"],
      additionalProperties: false,
    },
  },
};

const client = new OpenAI();
const model = "gpt-4o-mini";
const messages = [
  { role: "system", content: "Use the calculator, then say the result." },
  { role: "user", content: process.argv[2] },
];

const first = await client.chat.completions.create({
  model,
  messages,
  tools: [add],
  tool_choice: "required",
  parallel_tool_calls: false,
  max_tokens: 200,
});
const message = first.choices[0].message;
messages.push(message);
for (const call of message.tool_calls ?? []) {
  const { a, b } = JSON.parse(call.function.arguments);
  messages.push({ role: "tool", tool_call_id: call.id, content: String(a + b) });
}

const stream = await client.chat.completions.create({
  model,
  messages,
  tools: [add],
  max_tokens: 100,
  stream: true,
});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
}
process.stdout.write("\n");

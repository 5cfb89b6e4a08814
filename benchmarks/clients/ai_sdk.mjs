// Vercel's AI SDK with @ai-sdk/openai-compatible.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, jsonSchema, Output, streamText, tool } from "ai";
import { answer, assert, feature, model as name, question, v1 } from "./report.mjs";

const provider = createOpenAICompatible({ name: "stretto", baseURL: v1, supportsStructuredOutputs: true });
const model = provider(name);
const city = jsonSchema({
  type: "object",
  properties: { name: { enum: ["Rome", "Paris"] }, population: { type: "integer", minimum: 0, maximum: 9999999 } },
  required: ["name", "population"],
  additionalProperties: false,
});

await feature("answer", async () => {
  assert((await generateText({ model, prompt: question, temperature: 0 })).text.includes(answer));
});
await feature("stream", async () => {
  let text = "";
  for await (const part of streamText({ model, prompt: question, temperature: 0 }).textStream) text += part;
  assert(text.includes(answer), text);
});
await feature("structured", async () => {
  const output = Output.object({ schema: city });
  const said = await generateText({ model, prompt: question, output, maxOutputTokens: 200 });
  assert(typeof said.output.population === "number", said.output);
});
await feature("tools", async () => {
  const inputSchema = jsonSchema({ type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"] });
  const tools = { get_weather: tool({ description: "The weather", inputSchema, execute: async () => "sunny" }) };
  const prompt = "What is the weather in Rome?";
  const said = await generateText({ model, prompt, tools, toolChoice: "required", maxOutputTokens: 200 });
  assert(said.toolCalls[0].toolName === "get_weather");
});
await feature("turns", async () => {
  const first = await generateText({ model, prompt: question, maxOutputTokens: 60 });
  const messages = [
    { role: "user", content: question },
    ...first.response.messages,
    { role: "user", content: "Thank you!" },
  ];
  assert((await generateText({ model, messages, maxOutputTokens: 60 })).text !== undefined);
});
await feature("embeddings", async () => {
  const made = await embedMany({ model: provider.textEmbeddingModel(name), values: ["a", "b"] });
  assert(made.embeddings.length === 2);
});

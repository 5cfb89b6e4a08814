// openai (npm): chat completions and responses, with the helpers.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { answer, assert, feature, model, question, v1 } from "./report.mjs";

const client = new OpenAI({ baseURL: v1, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: question }];
const City = z.object({ name: z.enum(["Rome", "Paris"]), population: z.number().int().min(0).max(9999999) });
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};

await feature("answer", async () => {
  const said = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert(said.choices[0].message.content.includes(answer), said);
});
await feature("stream", async () => {
  const stream = client.chat.completions.stream({ model, messages, temperature: 0 });
  assert((await stream.finalContent()).includes(answer));
});
await feature("structured", async () => {
  const response_format = zodResponseFormat(City, "city");
  const said = await client.chat.completions.parse({ model, messages, response_format, max_tokens: 200 });
  City.parse(said.choices[0].message.parsed);
  const history = [...messages, said.choices[0].message, { role: "user", content: "Thank you!" }];
  assert((await client.chat.completions.create({ model, messages: history, max_tokens: 60 })).choices.length === 1);
});
await feature("tools", async () => {
  const called = [];
  const tool = {
    type: "function",
    function: { name: "get_weather", parameters, parse: JSON.parse, function: (a) => (called.push(a), "sunny") },
  };
  const asked = [{ role: "user", content: "What is the weather in Rome?" }];
  const said = await client.chat.completions.create({
    model, messages: asked, max_tokens: 200, tool_choice: "required",
    tools: [{ type: "function", function: { name: "get_weather", parameters, strict: true } }],
  });
  assert(said.choices[0].message.tool_calls[0].function.name === "get_weather", said);
  const runner = client.chat.completions.runTools({ model, messages: asked, tools: [tool], max_tokens: 100 });
  await runner.done();
});
await feature("turns", async () => {
  const said = await client.chat.completions.create({ model, messages, max_tokens: 60 });
  const history = [...messages, said.choices[0].message, { role: "user", content: "Thank you!" }];
  assert((await client.chat.completions.create({ model, messages: history, max_tokens: 60 })).choices.length === 1);
});
await feature("errors", async () => {
  try {
    await client.chat.completions.create({ model: "no-such-model", messages });
  } catch (error) {
    return assert(error instanceof OpenAI.NotFoundError, error);
  }
  throw new Error("an unknown model was accepted");
});
await feature("embeddings", async () => {
  assert((await client.embeddings.create({ model, input: ["a", "b"] })).data.length === 2);
});

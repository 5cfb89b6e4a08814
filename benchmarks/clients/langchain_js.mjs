// @langchain/openai (npm).
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { z } from "zod";
import { answer, assert, feature, model as name, question, v1 } from "./report.mjs";

const configuration = { baseURL: v1 };
const model = new ChatOpenAI({ model: name, apiKey: "none", configuration, temperature: 0, maxTokens: 200, maxRetries: 0 });
const City = z.object({ name: z.enum(["Rome", "Paris"]), population: z.number().int().min(0).max(9999999) }).describe("A city");

await feature("answer", async () => assert((await model.invoke(question)).content.includes(answer)));
await feature("stream", async () => {
  let text = "";
  for await (const part of await model.stream(question)) text += part.content;
  assert(text.includes(answer), text);
});
await feature("structured", async () => {
  City.parse(await model.withStructuredOutput(City, { name: "city" }).invoke("Rome has 2800000 people."));
});
await feature("tools", async () => {
  const tool = { name: "city", description: "Stores a city", schema: City };
  const said = await model.bindTools([tool], { tool_choice: "required" }).invoke("Rome has 2800000 people.");
  assert(said.tool_calls[0].name === "city", said);
});
await feature("turns", async () => {
  const said = await model.invoke([["user", question]]);
  assert((await model.invoke([["user", question], said, ["user", "Thank you!"]])).content !== undefined);
});
await feature("embeddings", async () => {
  const made = new OpenAIEmbeddings({ model: name, apiKey: "none", configuration, encodingFormat: "float" });
  assert((await made.embedDocuments(["a", "b"])).length === 2);
});

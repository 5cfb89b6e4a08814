// promptfoo: one evaluation, with an assertion on the answer.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { answer, assert, feature, model, question, v1 } from "./report.mjs";

await feature("answer", async () => {
  const folder = mkdtempSync(join(tmpdir(), "promptfoo-"));
  const config = {
    prompts: [question],
    providers: [{ id: `openai:chat:${model}`, config: { apiBaseUrl: v1, apiKey: "none", temperature: 0 } }],
    tests: [{ assert: [{ type: "contains", value: answer }] }],
  };
  writeFileSync(join(folder, "config.json"), JSON.stringify(config));
  const out = join(folder, "out.json");
  const script = join(process.cwd(), "node_modules", "promptfoo", "dist", "src", "entrypoint.js");
  const env = { ...process.env, PROMPTFOO_CONFIG_DIR: folder, PROMPTFOO_DISABLE_TELEMETRY: "1", PROMPTFOO_DISABLE_UPDATE: "1" };
  const words = [script, "eval", "-c", join(folder, "config.json"), "-o", out, "--no-cache"];
  execFileSync("node", words, { env, stdio: ["ignore", process.stderr, process.stderr] });
  const { results } = JSON.parse(readFileSync(out)).results;
  assert(results.length === 1 && results[0].success, results);
});

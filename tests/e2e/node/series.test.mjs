// OpenAI's Node SDK with classifiers and embedders, few rows and many.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI, { APIConnectionError, BadRequestError } from "openai";

const { BASE_URL, API_KEY } = process.env;
const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 });

test("moderations", async () => {
  const answer = await client.moderations.create({ model: "judge", input: ["refund my money", "please"] });
  assert.deepEqual(answer.results.map((result) => result.flagged), [true, false]);
  assert.deepEqual(answer.results[0].categories, { refund: true, login: false });
  assert.deepEqual(answer.results[0].category_applied_input_types, { refund: ["text"], login: ["text"] });
  await assert.rejects(client.moderations.create({ model: "plain", input: "x" }), BadRequestError);
});

test("many embeddings, by default as the SDK asks for them", async () => {
  const input = Array.from({ length: 9000 }, (_, index) => `refund ${index}`);
  const { data, usage } = await client.embeddings.create({ model: "embedder", input });
  assert.equal(data.length, 9000);
  assert.equal(data[8999].embedding.length, 3);
  assert.ok(usage.prompt_tokens > 9000);
});

test("an answer that is broken off is an error", async () => {
  const input = [...Array.from({ length: 9000 }, () => [4, 5]), [4000]];
  const asked = client.embeddings.create({ model: "embedder", input, encoding_format: "float" });
  await assert.rejects(asked, (error) => error instanceof APIConnectionError || error instanceof TypeError);
});

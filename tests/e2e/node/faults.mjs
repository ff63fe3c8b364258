// Asks every case that comes in on stdin with OpenAI's Node SDK, all at once, and says how each ended.
import { text } from "node:stream/consumers";

import OpenAI, { APIError } from "openai";

const { baseURL, apiKey, cases } = JSON.parse(await text(process.stdin));
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const said = "Tell me about the town.";

const CREATE = {
  chat: (body) => client.chat.completions.create({ ...body, messages: [{ role: "user", content: said }] }),
  completions: (body) => client.completions.create({ ...body, prompt: said }),
  responses: (body) => client.responses.create({ ...body, input: said }),
};

// The text of an event, and of an answer in one piece; and whether it says that this is the end.
const EVENT = {
  chat: (chunk) => [chunk.choices[0]?.delta.content ?? "", Boolean(chunk.choices[0]?.finish_reason)],
  completions: (chunk) => [chunk.choices[0]?.text ?? "", Boolean(chunk.choices[0]?.finish_reason)],
  responses: (event) => [
    event.type === "response.output_text.delta" ? event.delta : "",
    event.type === "response.completed",
  ],
};
const WHOLE = {
  chat: (answer) => [answer.choices?.[0].message.content ?? "", Boolean(answer.choices?.[0].finish_reason)],
  completions: (answer) => [answer.choices?.[0].text ?? "", Boolean(answer.choices?.[0].finish_reason)],
  responses: (answer) => [answer.output_text ?? "", answer.status === "completed"],
};

async function asked({ fault, route, stream, model }) {
  const outcome = { text: "", finished: false, raised: null, status: null, code: null };
  const take = ([text, finished]) => {
    outcome.text += text;
    outcome.finished ||= finished;
  };
  const begun = performance.now();
  try {
    const answer = await CREATE[route]({ model, stream, emulate: { fault } });
    if (stream) for await (const event of answer) take(EVENT[route](event));
    else take(WHOLE[route](answer));
  } catch (error) {
    outcome.raised = error.constructor.name;
    if (error instanceof APIError) Object.assign(outcome, { status: error.status ?? null, code: error.code ?? null });
  }
  return { ...outcome, text: outcome.text.slice(0, 100), seconds: (performance.now() - begun) / 1000 };
}

// One at a time of those whose answers are as large as an answer can be.
let huge = Promise.resolve();
const outcomes = cases.map((it) => {
  if (!it.fault.startsWith("huge")) return asked(it);
  huge = huge.then(() => asked(it));
  return huge;
});
process.stdout.write(JSON.stringify(await Promise.all(outcomes)));

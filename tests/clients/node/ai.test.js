// The Vercel AI SDK against a live server: its provider for compatible servers, and the one for OpenAI.

import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, NoObjectGeneratedError, Output, embedMany, generateText, isStepCount, streamText, tool } from 'ai';
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Review, Weather, full, keyed, modelId, storyPrompt, tooLong, url, weatherPrompt, whileFull } from './sdk.js';

globalThis.AI_SDK_LOG_WARNINGS = false;

const compatible = createOpenAICompatible({
  name: 'm40llm', baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: 'unused' });
/** Each way to the model: what people configure. `openai(…)` asks /v1/responses. */
const models = { compatible: compatible(modelId), chat: openai.chat(modelId), responses: openai(modelId) };
// No retries: a retried 503 would hide it.
const story = { prompt: storyPrompt, maxOutputTokens: 16, temperature: 0, maxRetries: 0 };
const weather = {
  prompt: weatherPrompt,
  tools: { get_weather: tool({ description: 'The weather of the next days.', inputSchema: Weather }) },
  toolChoice: { type: 'tool', toolName: 'get_weather' },
  maxOutputTokens: 200,
  temperature: 0,
  maxRetries: 0,
};
const review = { prompt: 'Review the film.', output: Output.object({ schema: Review }), maxOutputTokens: 64, maxRetries: 0 };

for (const [name, model] of Object.entries(models)) {
  test(`${name}: a stream is the answer`, async () => {
    const whole = await generateText({ model, ...story });
    assert.ok(whole.text.length > 0);
    assert.equal(whole.finishReason, 'length');
    assert.equal(whole.usage.outputTokens, 16);
    const stream = streamText({ model, ...story });
    const pieces = [];
    for await (const piece of stream.textStream) pieces.push(piece);
    assert.ok(pieces.length > 4);
    assert.equal(pieces.join(''), whole.text);
    assert.equal(await stream.finishReason, 'length');
    const usage = await stream.usage;
    assert.equal(usage.outputTokens, 16);
    assert.equal(usage.inputTokens, whole.usage.inputTokens);
  });

  test(`${name}: a call, streamed and not`, async () => {
    const whole = await generateText({ model, ...weather });
    assert.equal(whole.finishReason, 'tool-calls');
    assert.equal(whole.toolCalls.length, 1);
    assert.equal(whole.toolCalls[0].toolName, 'get_weather');
    Weather.parse(whole.toolCalls[0].input);
    const stream = streamText({ model, ...weather });
    const kinds = [];
    for await (const part of stream.fullStream) kinds.push(part.type);
    const calls = await stream.toolCalls;
    assert.deepEqual(calls.map((call) => call.input), whole.toolCalls.map((call) => call.input));
    assert.ok(kinds.filter((kind) => kind === 'tool-input-delta').length > 1, 'the arguments come in pieces');
  });

  test(`${name}: an answer of a shape, streamed and not`, async () => {
    Review.parse((await generateText({ model, ...review })).output);
    const stream = streamText({ model, ...review });
    await stream.consumeStream();
    Review.parse(await stream.output);
  });
}

test('all providers say the same', async () => {
  const texts = await Promise.all(Object.values(models).map(async (model) => (await generateText({ model, ...story })).text));
  assert.equal(new Set(texts).size, 1, JSON.stringify(texts));
});

test('completions', async () => {
  const { text } = await generateText({ model: compatible.completionModel(modelId), ...story });
  assert.ok(text.length > 0);
});

test('embeddings', async () => {
  for (const provider of [compatible, openai]) {
    const { embeddings, usage } = await embedMany({ model: provider.embeddingModel(modelId), values: ['The cat sleeps.', storyPrompt], maxRetries: 0 });
    assert.equal(embeddings.length, 2);
    assert.ok(embeddings[0].length > 100);
    assert.ok(usage.tokens > 0);
  }
});

test('an answer cut short is no object', async () => {
  const asked = generateText({ model: models.compatible, ...review, maxOutputTokens: 2 });
  await assert.rejects(async () => (await asked).output, (error) => NoObjectGeneratedError.isInstance(error) || error.name === 'AI_NoOutputGeneratedError');
});

/** An assertion on the SDK's error. */
function callError(status, message, retryable = false) {
  return (error) => {
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.statusCode, status);
    assert.match(error.message, message);
    assert.equal(error.isRetryable, retryable);
    return true;
  };
}

const providers = {
  compatible: (apiKey) => createOpenAICompatible({ name: 'm40llm', baseURL: `${keyed.url}/v1`, apiKey })(modelId),
  responses: (apiKey) => createOpenAI({ baseURL: `${keyed.url}/v1`, apiKey })(modelId),
};

for (const [name, withKey] of Object.entries(providers)) {
  test(`${name}: errors`, async () => {
    const ask = (model, more = {}) => generateText({ model, ...story, ...more });
    const nonsense = name === 'compatible' ? compatible('gpt-nonsense') : openai('gpt-nonsense');
    await assert.rejects(ask(nonsense), callError(404, /gpt-nonsense/));
    await assert.rejects(ask(models[name], { temperature: 9 }), callError(400, /temperature/));
    await assert.rejects(ask(withKey('none')), callError(401, /key/));
    await assert.rejects(ask(withKey(keyed.keyOfMetrics)), callError(403, /scope/));
    await assert.rejects(ask(withKey(keyed.keyWithoutTokens)), callError(429, /tokens/, true));
    await assert.rejects(ask(withKey(keyed.key), { prompt: tooLong }), callError(400, /maximum context length/));
    await whileFull(() => assert.rejects(ask(withKey(keyed.key)), callError(503, /./, true)));
  });
}

if (full) {
  test('steps: a tool is called, and its result goes back', async () => {
    const given = [];
    const execute = async (input) => (given.push(input), 'sunny');
    const tools = { get_weather: tool({ inputSchema: Weather, execute }) };
    for (const model of Object.values(models)) {
      given.length = 0;
      const answer = await generateText({ model, ...weather, tools, stopWhen: isStepCount(2) });
      assert.equal(answer.steps.length, 2);
      for (const input of given) Weather.parse(input);
      assert.ok(given.length >= 1);
    }
  });
}

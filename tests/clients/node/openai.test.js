// openai-node against a live server.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat, zodFunction } from 'openai/helpers/zod';
import { Review, Weather, becomesIdle, full, keyed, modelId, running, storyPrompt, tooLong, url, weatherPrompt, whileFull } from './sdk.js';

// No retries: a retried 503 would hide it.
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0, timeout: 300_000 });
const story = [{ role: 'user', content: storyPrompt }];
const count = '1, 2, 3, 4, 5, 6, 7, 8, 9,';

const chat = (more = {}) => client.chat.completions.create({ model: '', messages: story, max_tokens: 16, temperature: 0, ...more });
const complete = (more = {}) => client.completions.create({ model: '', prompt: count, max_tokens: 16, temperature: 0, ...more });

async function streamedText(stream) {
  let text = '';
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? chunk.choices[0]?.text ?? '';
  return text;
}

test('a chat answer', async () => {
  const answer = await chat();
  assert.equal(answer.object, 'chat.completion');
  assert.equal(answer.model, modelId);
  assert.equal(answer.choices[0].message.role, 'assistant');
  assert.ok(answer.choices[0].message.content.length > 0);
  assert.equal(answer.choices[0].finish_reason, 'length');
  assert.equal(answer.usage.completion_tokens, 16);
  assert.ok(answer._request_id);
});

test('a streamed chat equals the unstreamed', async () => {
  const whole = await chat();
  assert.equal(await streamedText(await chat({ stream: true })), whole.choices[0].message.content);
});

test('the stream helper assembles the same message, with usage', async () => {
  const whole = await chat();
  const helper = client.chat.completions.stream({
    model: '', messages: story, max_tokens: 16, temperature: 0, stream_options: { include_usage: true },
  });
  const final = await helper.finalChatCompletion();
  assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
  assert.equal(final.choices[0].message.role, 'assistant');
  assert.equal(final.choices[0].finish_reason, 'length');
  assert.deepEqual(final.usage, whole.usage);
});

test('completions, streamed and not, with a stop string', async () => {
  const whole = await complete({ max_tokens: 48, stop: [', 12'] });
  assert.equal(whole.choices[0].text, ' 10, 11');
  assert.equal(whole.choices[0].finish_reason, 'stop');
  assert.equal(await streamedText(await complete({ max_tokens: 48, stop: ', 12', stream: true })), ' 10, 11');
});

test('characters of several tokens arrive whole', async () => {
  const pieces = [];
  for await (const chunk of await complete({ prompt: '🦀\n'.repeat(8), max_tokens: 24, stream: true })) {
    pieces.push(chunk.choices[0].text);
  }
  assert.ok(pieces.join('').startsWith('🦀\n🦀\n🦀\n'), pieces.join(''));
  assert.ok(pieces.every((piece) => !piece.includes('\uFFFD')));
});

test('eight streams at once equal one after another', async () => {
  const prompts = ['Once upon a time', 'def f(n):', count, 'The capital of France is', 'SELECT', 'In 1969', '# Title\n', 'Dear Sir,'];
  const alone = [];
  for (const prompt of prompts) alone.push((await complete({ prompt })).choices[0].text);
  const together = await Promise.all(prompts.map(async (prompt) => streamedText(await complete({ prompt, stream: true }))));
  assert.deepEqual(together, alone);
});

test('the same seed gives the same text', async () => {
  const sample = async (seed) => (await chat({ temperature: 1.2, seed })).choices[0].message.content;
  assert.equal(await sample(1), await sample(1));
  assert.notEqual(await sample(1), await sample(2));
});

test('logprobs', async () => {
  const answer = await chat({ logprobs: true, top_logprobs: 2, max_tokens: 4 });
  assert.equal(answer.choices[0].logprobs.content.length, 4);
  for (const entry of answer.choices[0].logprobs.content) assert.equal(entry.top_logprobs.length, 2);
});

test('errors are the classes of the SDK', async () => {
  await assert.rejects(chat({ model: 'gpt-nonsense' }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, 'model_not_found');
    return true;
  });
  await assert.rejects(chat({ temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, 'temperature');
    assert.equal(error.type, 'invalid_request_error');
    return true;
  });
  await assert.rejects(chat({ messages: [{ role: 'user', content: 'hello '.repeat(3000) }], stream: true }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.code, 'context_length_exceeded');
    return true;
  });
});

test('models', async () => {
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  assert.deepEqual(models, [modelId]);
  assert.equal((await client.models.retrieve(modelId)).id, modelId);
});

test('aborting a stream ends the work', async () => {
  const stream = await complete({ max_tokens: 1900, temperature: 1.8, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    assert.ok((await running()) >= 1);
    stream.controller.abort();
    break;
  }
  assert.ok(await becomesIdle(4000));
});

test('aborting an unstreamed request ends the work', async () => {
  const abort = new AbortController();
  const asked = client.completions.create({ model: '', prompt: count, max_tokens: 1900, temperature: 1.8 }, { signal: abort.signal });
  setTimeout(() => abort.abort(), 400);
  await assert.rejects(asked, OpenAI.APIUserAbortError);
  assert.ok(await becomesIdle(4000));
});

const weather = { tools: [zodFunction({ name: 'get_weather', parameters: Weather })], tool_choice: 'required', parallel_tool_calls: false };
const askWeather = { model: '', messages: [{ role: 'user', content: weatherPrompt }], temperature: 0, ...weather };
const review = { model: '', messages: [{ role: 'user', content: 'Review the film.' }], max_tokens: 64 };

test('a call, streamed and not', async () => {
  const whole = (await client.chat.completions.parse(askWeather)).choices[0];
  assert.equal(whole.finish_reason, 'tool_calls');
  assert.equal(whole.message.content, null);
  const [call] = whole.message.tool_calls;
  Weather.parse(call.function.parsed_arguments);
  const pieces = [];
  const helper = client.chat.completions.stream(askWeather);
  helper.on('tool_calls.function.arguments.delta', (event) => pieces.push(event.arguments_delta));
  const final = (await helper.finalChatCompletion()).choices[0];
  assert.equal(final.finish_reason, 'tool_calls');
  assert.equal(final.message.tool_calls[0].function.arguments, call.function.arguments);
  assert.ok(pieces.length > 1);
  assert.equal(pieces.join(''), call.function.arguments);
});

test('a call and its result go back', async () => {
  const { message } = (await client.chat.completions.create(askWeather)).choices[0];
  const result = { role: 'tool', tool_call_id: message.tool_calls[0].id, content: 'sunny' };
  const messages = [...askWeather.messages, message, result];
  const answer = await client.chat.completions.create({ model: '', messages, tools: weather.tools, max_tokens: 8 });
  assert.ok(answer.usage.prompt_tokens > 40);
});

test('an answer of a shape, streamed and not', async () => {
  const asked = { ...review, response_format: zodResponseFormat(Review, 'review'), temperature: 1.5, seed: 5 };
  const { parsed, content } = (await client.chat.completions.parse(asked)).choices[0].message;
  Review.parse(parsed);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.parsed, parsed);
  assert.equal(final.choices[0].message.content, content);
});

test('responses, streamed and not', async () => {
  const asked = { model: '', input: storyPrompt, max_output_tokens: 16, temperature: 0 };
  const answer = await client.responses.create(asked);
  assert.equal(answer.status, 'incomplete');
  assert.equal(answer.output_text, (await chat()).choices[0].message.content);
  assert.equal(answer.usage.output_tokens, 16);
  let text = '';
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    if (event.type === 'response.output_text.delta') text += event.delta;
  }
  assert.equal(text, answer.output_text);
});

test('responses of a shape', async () => {
  const asked = { model: '', input: 'Review the film.', max_output_tokens: 64, text: { format: zodTextFormat(Review, 'review') } };
  Review.parse((await client.responses.parse(asked)).output_parsed);
});

test('embeddings', async () => {
  const { data, usage } = await client.embeddings.create({ model: '', input: ['The cat sleeps.', storyPrompt] });
  assert.equal(data.length, 2);
  const norm = Math.hypot(...data[0].embedding);
  assert.ok(Math.abs(norm - 1) < 1e-3, `${norm}`);
  assert.ok(usage.prompt_tokens > 0);
});

test('keys and limits are the classes of the SDK', async () => {
  const hello = { model: '', messages: [{ role: 'user', content: 'Say hello.' }], max_tokens: 4 };
  for (const [apiKey, type, code] of [
    ['none', OpenAI.AuthenticationError, 'invalid_api_key'],
    [keyed.keyOfMetrics, OpenAI.PermissionDeniedError, 'insufficient_scope'],
    [keyed.keyWithoutTokens, OpenAI.RateLimitError, 'rate_limit_exceeded'],
  ]) {
    const other = new OpenAI({ baseURL: `${keyed.url}/v1`, apiKey, maxRetries: 0 });
    for (const stream of [false, true]) {
      await assert.rejects(other.chat.completions.create({ ...hello, stream }), (error) => {
        assert.ok(error instanceof type, `${error}`);
        assert.equal(error.code, code);
        return true;
      });
    }
  }
  const other = new OpenAI({ baseURL: `${keyed.url}/v1`, apiKey: keyed.key, maxRetries: 0 });
  await assert.rejects(other.chat.completions.create({ ...hello, messages: [{ role: 'user', content: tooLong }] }), { code: 'context_length_exceeded' });
  await whileFull(() =>
    assert.rejects(other.chat.completions.create(hello), (error) => {
      assert.ok(error instanceof OpenAI.InternalServerError);
      assert.equal(error.status, 503);
      assert.equal(error.code, 'overloaded');
      return true;
    }),
  );
});

if (full) {
  test('the runner calls tools and gives their results back', async () => {
    const asked = [];
    const tool = zodFunction({ name: 'get_weather', parameters: Weather, function: (given) => asked.push(given) && 'sunny' });
    const runner = client.chat.completions.runTools({ ...askWeather, tools: [tool], max_tokens: 200 }, { maxChatCompletions: 2 });
    await runner.done();
    assert.ok(asked.length >= 1);
    for (const given of asked) Weather.parse(given);
  });

  test('a call over responses', async () => {
    const tool = { type: 'function', name: 'get_weather', strict: true, parameters: weather.tools[0].function.parameters };
    const answer = await client.responses.create({
      model: '', input: weatherPrompt, tools: [tool], tool_choice: 'required', parallel_tool_calls: false, max_output_tokens: 200,
    });
    const call = answer.output.at(-1);
    assert.equal(call.type, 'function_call');
    Weather.parse(JSON.parse(call.arguments));
  });
}

// The conversation. What a model says is text and stays text: nothing here makes markup of it.

const form = byId('composer');
const input = byId('prompt');
const transcript = byId('transcript');
const turns = byId('turns');
const news = byId('news');
const panel = byId('panel-toggle');

/** What was said, as the API wants it. */
let messages = [];
/** Ends the answer that is being written. */
let answering = null;

function openPanel(open) {
  document.body.classList.toggle('panel-open', open);
  panel.setAttribute('aria-expanded', String(open));
  panel.textContent = open ? 'Chat' : 'Settings';
  if (open) watch();
}

/** Adds a turn to the transcript. */
function turn(who, kind, text) {
  const item = document.createElement('li');
  item.className = `turn ${kind}`;
  const [heading, body, meta, error, thoughts, summary, thought] =
    ['h3', 'div', 'p', 'p', 'details', 'summary', 'div'].map((name) => document.createElement(name));
  heading.textContent = who;
  body.className = 'text';
  body.textContent = text;
  meta.className = 'meta';
  error.className = 'error';
  thoughts.hidden = true;
  summary.textContent = 'Thoughts';
  thought.className = 'text';
  thoughts.append(summary, thought);
  item.append(heading, thoughts, body, meta, error);
  turns.append(item);
  byId('welcome').hidden = true;
  transcript.scrollTop = transcript.scrollHeight;
  return { item, body, meta, error, thoughts, thought };
}

/** The request for what was said so far. Settings that are left empty are the server's. */
function request() {
  const system = byId('system').value.trim();
  const body = {
    model, stream: true, stream_options: { include_usage: true },
    messages: system ? [{ role: 'system', content: system }, ...messages] : messages,
  };
  for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
    if (byId(name).value !== '') body[name] = byId(name).valueAsNumber;
  }
  return JSON.stringify(body);
}

/** Writes an answer into `view` as it comes; returns its text once it is whole. */
async function write(view, answer, signal) {
  const begun = performance.now();
  const response = await ask('v1/chat/completions', {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: request(), signal,
  });
  let first, last, pieces = 0, usage = null;
  const tell = () => {
    const seconds = (last - first) / 1000;
    const tokens = usage?.completion_tokens ?? pieces;
    const facts = [`${count(tokens)} tokens`];
    // The first token is the prompt's work; the others took the time between them.
    if (tokens > 1 && seconds > 0) facts.push(`${rate((tokens - 1) / seconds)} tokens/s`);
    facts.push(`first after ${((first - begun) / 1000).toFixed(2)} s`);
    if (answer.reason === 'length') facts.push('cut off: out of tokens');
    view.meta.textContent = facts.join(' · ');
  };
  for await (const data of events(response)) {
    if (data === '[DONE]') break;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const choice = event.choices[0];
    answer.reason = choice?.finish_reason ?? answer.reason;
    const { content: piece, reasoning_content: thought } = choice?.delta ?? {};
    if (piece || thought) {
      last = performance.now();
      first ??= last;
      pieces += 1;
      answer.text += piece ?? '';
      // Whoever has scrolled up reads on undisturbed.
      const atEnd = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 48;
      if (thought) view.thoughts.hidden = false;
      view.thought.append(thought ?? '');
      view.body.append(piece ?? '');
      tell();
      if (atEnd) transcript.scrollTop = transcript.scrollHeight;
    }
  }
  if (first) tell();
  // A stream that ends without a reason was cut by what is between here and the server.
  if (!answer.reason) throw new Error('The answer broke off before its end.');
}

function busy(is) {
  const focused = document.activeElement;
  const [send, stop] = [byId('send'), byId('stop')];
  send.hidden = is;
  stop.hidden = !is;
  byId('clear').hidden = is || messages.length === 0;
  // The button that had the focus is gone; its place is the other one's.
  if (is && focused === send) stop.focus();
  if (!is && focused === stop) send.focus();
}

async function send() {
  const text = input.value.trim();
  if (!text || answering) return;
  input.value = '';
  messages.push({ role: 'user', content: text });
  turn('You', 'user', text);
  const view = turn('Model', 'model busy', '');
  const answer = { text: '', reason: null };
  answering = new AbortController();
  busy(true);
  news.textContent = 'The model is answering.';
  try {
    await write(view, answer, answering.signal);
    news.textContent = `The model: ${answer.text}`;
  } catch (error) {
    const stopped = answering.signal.aborted;
    if (stopped) view.meta.textContent += view.meta.textContent ? ' · stopped' : 'Stopped';
    else view.error.textContent = error.message;
    news.textContent = stopped ? 'Stopped.' : `Error: ${error.message}`;
    if (error.status === 401 || error.status === 403) keyIsWrong(error.message);
  }
  view.item.classList.remove('busy');
  if (answer.text) {
    messages.push({ role: 'assistant', content: answer.text });
  } else {
    // Nothing was answered: the question may be asked again, and is no part of the conversation.
    messages.pop();
    input.value ||= text;
  }
  answering = null;
  busy(false);
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  send();
});
input.addEventListener('keydown', (event) => {
  // A phone's Enter is a new line, as it has no Shift; while a word is being composed it chooses that.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || matchMedia('(pointer: coarse)').matches) return;
  event.preventDefault();
  form.requestSubmit();
});
// What is wrong with a setting the browser says beside it, which needs to be seen for that.
for (const setting of document.querySelectorAll('aside input')) {
  setting.addEventListener('invalid', () => openPanel(true));
}
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') answering?.abort();
});
byId('stop').addEventListener('click', () => answering?.abort());
byId('clear').addEventListener('click', () => {
  messages = [];
  turns.replaceChildren();
  byId('welcome').hidden = false;
  byId('clear').hidden = true;
  news.textContent = 'The conversation is empty.';
  input.focus();
});
for (const example of byId('welcome').querySelectorAll('button')) {
  example.addEventListener('click', () => {
    input.value = example.textContent;
    form.requestSubmit();
    input.focus();
  });
}
panel.addEventListener('click', () => openPanel(panel.getAttribute('aria-expanded') !== 'true'));

greet();
watch();
if (!matchMedia('(pointer: coarse)').matches) input.focus();

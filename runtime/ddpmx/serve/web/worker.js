// What the page's worker is where a server draws: the same messages, from server-sent events.

let model, connection;

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "open") await open();
    else if (data.kind === "cancel") connection?.abort();
    else await draw(data);
  } catch (error) {
    if (connection?.signal.aborted) self.postMessage({ kind: "cancelled" });
    else self.postMessage({ kind: "fault", text: error instanceof Error ? error.message : String(error) });
  }
};

async function open() {
  model = await (await fetch("model.json")).json();
  self.postMessage({ kind: "model", model });
  self.postMessage({ kind: "ready", text: "Ready." });
}

/** Draw on the server. To hang up ends the chain there as well. */
async function draw({ n, seed, steps, labels, guidance, towards, share: between, condition }) {
  const wanted = new URLSearchParams({ n, seed, guidance }), share = {}, headers = { "Content-Type": "application/json" };
  if (Number(steps) < model.spec.timesteps) wanted.set("steps", steps);
  if (towards !== undefined) {
    wanted.set("towards", towards);
    wanted.set("share", between);
  }
  for (const label of labels ?? []) wanted.append("labels", label);
  connection = new AbortController();
  const { signal } = connection;
  const answer = condition === undefined
    ? await fetch(`v1/events?${wanted}`, { signal })
    : await fetch("v1/events", { signal, method: "POST", headers, body: body(wanted, condition) });
  if (!answer.ok) throw new Error(await refusal(answer));
  for await (const [kind, data] of events(answer.body)) {
    if (kind === "step") {
      share[data.first] = (data.n * data.step) / data.steps / n;
      const sum = Object.values(share).reduce((a, b) => a + b);
      self.postMessage({ kind: "step", first: data.first, drawn: pictures(data.levels), share: sum, t: data.t });
    } else if (kind === "drawn") {
      self.postMessage({ kind: "step", first: 0, drawn: pictures(data.levels), share: 1, t: 0 });
      self.postMessage({ kind: "drawn", seconds: data.seconds });
      return;
    } else if (kind === "fault") throw new Error(data.detail);
  }
  throw new Error("the server is gone");
}

/** A request with its condition as JSON. A seed is a whole number of 64 bits, which JSON.stringify has not. */
function body(wanted, condition) {
  const fields = [...new Set(wanted.keys())].map((name) => {
    const values = wanted.getAll(name);
    return `"${name}":${name === "labels" ? JSON.stringify(values) : values[0]}`;
  });
  return `{${[...fields, `"cond":${JSON.stringify(condition)}`].join(",")}}`;
}

/** Why the server does not draw. */
async function refusal(answer) {
  const { detail, hint } = await answer.json().catch(() => ({ detail: answer.statusText }));
  return hint ? `${detail} (${hint})` : detail;
}

/** The server-sent events of a stream: [kind, data], data as JSON. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    text += part.value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const found = /^event: (\w+)\ndata: (.*)$/.exec(text.slice(0, end));
      text = text.slice(end + 2);
      if (found) yield [found[1], JSON.parse(found[2])];
    }
  }
}

/** Levels [n, H, W, C] in base64 as RGBA, an array for each image. */
function pictures(text) {
  const [channels, height, width] = model.spec.shape, size = channels * height * width, area = height * width;
  const levels = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return Array.from({ length: levels.length / size }, (_, i) => {
    const found = new Uint8ClampedArray(4 * area);
    for (let j = 0; j < area; j++) {
      const at = i * size + j * channels;
      for (let c = 0; c < 3; c++) found[4 * j + c] = levels[channels >= 3 ? at + c : at];
      found[4 * j + 3] = channels === 4 ? levels[at + 3] : 255;
    }
    return found;
  });
}

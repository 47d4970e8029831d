// The server's API. Whatever goes wrong is an Error whose message is for people.

const TRIES = 3; // to send a request that the server does not answer
const BETWEEN_TRIES = 1000; // milliseconds

// What the server says is wrong; param: the field that it is about.
export class Refusal extends Error {
  constructor(message, param, status) {
    super(message);
    Object.assign(this, { param, status });
  }
}

export class Unreachable extends Error {
  constructor() {
    super("the server does not answer: try again in a moment");
  }
}

let signIn = async () => {};

// ask: called when the server does not know us; the call goes on when it is done.
export function whenSignedOut(ask) {
  signIn = ask;
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Unreachable();
  }
  if (response.ok) return response;
  if ([502, 503, 504].includes(response.status)) throw new Unreachable(); // a proxy's word for the same
  if (response.status === 401 && path !== "/session") {
    await signIn();
    return call(path, options);
  }
  const body = await response.json().catch(() => null);
  const error = body?.error ?? { message: `the server answered ${response.status}` };
  throw new Refusal(error.message, error.param ?? null, response.status);
}

// JSON, with seeds that are larger than a number holds exactly as text.
const parse = (text) =>
  JSON.parse(text, (name, value, { source } = {}) =>
    name === "seed" && source && !Number.isSafeInteger(value) ? source : value,
  );
const json = async (path, options) => parse(await (await call(path, options)).text());
const place = (id) => `/v1/videos/${encodeURIComponent(id)}`;

export const session = () => json("/session");
export const signOut = () => call("/session", { method: "DELETE" });
export const models = async () => (await json("/v1/models")).data;
export const cancel = (id) => json(`${place(id)}/cancel`, { method: "POST" });
export const remove = (id) => call(place(id), { method: "DELETE" });
export const content = (id, variant, index) => `${place(id)}/content?variant=${variant}&index=${index}`;
export const reference = (id, index) => `${place(id)}/references/${index}`;
export const picture = async (path) => (await call(path)).blob();

export const sendKey = (key) =>
  call("/session", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ key }),
  });

// A page of videos, the newest first: {data, has_more}.
export const list = (after) =>
  json(`/v1/videos?limit=24${after ? `&after=${encodeURIComponent(after)}` : ""}`);

// Asks for a video: {prompt, model, seed, n, options, pictures: [{label, file}]}. Sent again where nothing is
// answered; the key makes it one video however often it arrives.
export async function create(wanted) {
  const form = new FormData();
  for (const [name, value] of Object.entries({
    prompt: wanted.prompt,
    model: wanted.model,
    seed: wanted.seed,
    n: wanted.n,
    ...wanted.options,
  })) {
    if (value === undefined || value === null || value === "") continue;
    form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  for (const { label, file } of wanted.pictures) {
    form.append("input_reference", file, "picture");
    form.append("label", label);
  }
  const key = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("-");
  for (let left = TRIES; ; left--) {
    try {
      return await json("/v1/videos", { method: "POST", body: form, headers: { "idempotency-key": key } });
    } catch (error) {
      if (!(error instanceof Unreachable) || left <= 1) throw error;
      await new Promise((done) => setTimeout(done, BETWEEN_TRIES));
    }
  }
}

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;

// Changes of all our videos as they happen, while the page is looked at: a hidden page lets go of its connection,
// of which a browser has few. connected: called each time that what was missed should be asked for.
export function listen(told, connected, lost) {
  let source = null;
  let waiting = 0;
  const close = () => {
    clearTimeout(waiting);
    source?.close();
    source = null;
  };
  const open = () => {
    close();
    if (document.hidden) return;
    source = new EventSource("/v1/events");
    source.onopen = connected;
    source.onerror = () => {
      lost();
      if (source?.readyState === EventSource.CLOSED) waiting = setTimeout(again, 2000); // it was refused
    };
    for (const name of ["status", "step", "preview", "queue", "deleted"]) {
      source.addEventListener(name, (event) => told[name](parse(event.data)));
    }
  };
  const again = async () => {
    try {
      await models(); // asks who we are, if need be
      open();
    } catch {
      waiting = setTimeout(again, 2000);
    }
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("online", open);
  open();
}

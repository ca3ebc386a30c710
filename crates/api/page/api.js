// The HTTP interface as this page uses it. Whatever the page shows comes from here.

/** A refusal of the server (RFC 9457), with its code and the way out. */
export class Refused extends Error {
  constructor(problem) {
    super(problem.remedy ? `${problem.detail}. ${problem.remedy}` : problem.detail);
    this.code = problem.code;
    this.status = problem.status;
    /** What is wrong and what helps, apart. */
    this.problem = { code: problem.code, message: problem.detail, remedy: problem.remedy };
    this.signIn = problem.status === 401;
  }
}

/** The token of this tab; it goes with the tab, and only to this server. */
export const session = {
  get token() { return sessionStorage.getItem("daybook-token") ?? ""; },
  set token(token) { token ? sessionStorage.setItem("daybook-token", token) : sessionStorage.removeItem("daybook-token"); },
};

/** Who the server takes a token for; none is kept before this has said so. */
export async function whoHas(token) {
  // Nothing else can stand in a header.
  if (!/^[\x21-\x7e]+$/.test(token)) throw new Refused({ detail: "This is no token: it has characters that no token has", remedy: "Paste the token alone." });
  return asked("/api/v1/whoami", { headers: { authorization: `Bearer ${token}` } }, answer);
}

/** What whoever looks at this page may do, and where: a verb, and all projects or those named. Nothing,
 *  while it is not known. */
let granted;

/** Asks the server what may be done here. Says whether it is something else than was known. */
export async function learnWhatMayBeDone() {
  const before = JSON.stringify(granted);
  granted = (await get("whoami")).may ?? {};
  return JSON.stringify(granted) !== before;
}

/** Whether something may be done in a project; in any one, if none is given. The server decides: this
 *  only keeps buttons away that it would refuse, and where it is not known it keeps none away. */
export function may(verb, project) {
  if (!granted) return true;
  const where = granted[verb];
  if (!where) return false;
  return where === "all" || (project ? where.named.includes(project) : where.named.length > 0);
}

/** A controller that ends with a signal at the latest, also if that has ended already. */
export function within(signal) {
  const own = new AbortController();
  if (signal?.aborted) own.abort();
  signal?.addEventListener("abort", () => own.abort(), { once: true, signal: own.signal });
  return own;
}

/** Fetches with the token, if there is one. */
function request(url, { headers = {}, ...more } = {}) {
  const token = headers.authorization ? "" : session.token;
  return fetch(url, { ...more, headers: token ? { ...headers, authorization: `Bearer ${token}` } : headers });
}

/** Longer than this nobody waits for an answer; the server itself gives up after 30 s. */
const PATIENCE = 40_000;
const NO_ANSWER = "The server did not answer. A browser has only so many connections to it: close other tabs of this page, if there are many";

/** Asks, and reads the answer with `read`, within a time. */
async function asked(url, { signal, ...options }, read) {
  const mine = within(signal);
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    mine.abort();
  }, PATIENCE);
  try {
    return await read(await request(url, { ...options, signal: mine.signal }));
  } catch (error) {
    throw late ? new Error(NO_ANSWER) : error;
  } finally {
    clearTimeout(timer);
    mine.abort();
  }
}

async function answer(response) {
  const text = await response.text();
  let body = {};
  try {
    body = JSON.parse(text);
  } catch {
    // Something between here and the server may answer in its own words.
  }
  if (response.ok) return body;
  throw new Refused({ detail: `the server answered ${response.status}`, ...body, status: response.status });
}

/** Reads; parameters without a value are left out. */
export async function get(path, parameters = {}, signal) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, v]) => v !== undefined && v !== null && v !== ""));
  const url = query.size ? `/api/v1/${path}?${query}` : `/api/v1/${path}`;
  return asked(url, { headers: { accept: "application/json" }, signal }, answer);
}

/** Reads what is stored, byte for byte. */
export function getBytes(url, signal) {
  return asked(url, { signal }, async (response) => (response.ok ? new Uint8Array(await response.arrayBuffer()) : answer(response)));
}

/** Keeps an answer as a file. Without a token the browser fetches it by itself; a token stands in no
 *  address, so with one the answer passes through the page. */
export async function save(path, parameters, name) {
  const query = new URLSearchParams(Object.entries({ ...parameters, download: "true" }).filter(([, v]) => v));
  const url = `/api/v1/${path}?${query}`;
  const link = document.createElement("a");
  link.download = name;
  if (!session.token) {
    link.href = url;
    link.click();
    return;
  }
  const response = await request(url);
  if (!response.ok) await answer(response);
  link.href = URL.createObjectURL(await response.blob());
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export const actor = {
  get name() { return localStorage.getItem("daybook-actor") ?? ""; },
  set name(name) { localStorage.setItem("daybook-actor", name); },
};

/** Told where the server refuses for want of a role: what is known of roles may be old. */
export const denials = new EventTarget();

/** Asks for a change. With the same key it is carried out once, however often it is sent. */
export async function send(method, path, body, key = crypto.randomUUID(), more = {}) {
  const headers = { "content-type": "application/json", accept: "application/json", "idempotency-key": key, ...more };
  if (actor.name) headers["daybook-actor"] = actor.name;
  const options = { method, headers };
  if (body !== undefined) options.body = JSON.stringify(body);
  try {
    return await asked(`/api/v1/${path}`, options, answer);
  } catch (error) {
    if (error.status === 403) denials.dispatchEvent(new Event("denied"));
    throw error;
  }
}

/** What one dialog sends. Where no answer came, the same is sent again under the same key: it is carried
 *  out once, and what it made is answered again. What was refused for certain, or is something else,
 *  has a key of its own. */
export function errand() {
  let key;
  let before;
  return async (method, path, body, headers) => {
    const what = JSON.stringify([method, path, body ?? null, headers ?? null]);
    if (what !== before) [key, before] = [crypto.randomUUID(), what];
    try {
      return await send(method, path, body, key, headers);
    } catch (error) {
      if (error.status >= 400 && error.status < 500 && error.status !== 408) before = undefined;
      else if (!error.code || ["timeout", "outcome_unknown"].includes(error.code)) {
        error = new Refused({ code: error.code ?? "no_answer", detail: error.problem?.message ?? error.message, status: error.status,
          remedy: "It may have been done. The same click once more asks again, and nothing is done twice" });
      }
      error.open = before !== undefined;
      throw error;
    }
  };
}

/** Until somebody looks at this tab, or the signal. */
function lookedAt(signal) {
  return new Promise((resolve) => {
    const over = within(signal);
    over.signal.addEventListener("abort", resolve);
    const look = () => { if (!document.hidden) over.abort(); };
    document.addEventListener("visibilitychange", look, { signal: over.signal });
    look();
    if (over.signal.aborted) resolve();
  });
}

/**
 * Follows a stream of server-sent events until `signal`, for ever: a connection that ends is made
 * again after the last event, so nothing is missed. While nobody looks at the tab there is none: a
 * browser has few connections to a server, for all tabs together. It ends where the server wants to
 * know who asks, and, if somebody wants to know of it, where it refuses.
 */
export async function follow(url, onEvent, { last, signal, onState = () => {}, onSignIn = () => {}, onRefused }) {
  let pause = 500;
  for (;;) {
    await lookedAt(signal);
    if (signal.aborted) return;
    const mine = within(signal);
    let left = false;
    let why;
    let wait = 0;
    document.addEventListener("visibilitychange", () => {
      left = document.hidden;
      if (left) mine.abort();
    }, { signal: mine.signal });
    // It answers at once, or there is no connection to be had.
    const timer = setTimeout(() => {
      why = NO_ANSWER;
      mine.abort();
    }, PATIENCE);
    try {
      const headers = { accept: "text/event-stream" };
      if (last !== undefined) headers["last-event-id"] = String(last);
      const response = await request(url, { headers, signal: mine.signal });
      clearTimeout(timer);
      if (response.status === 401) {
        onState(false, "not signed in");
        return onSignIn(new Refused(await response.json().catch(() => ({ detail: "The server asks who you are" }))));
      }
      if (onRefused && response.status >= 400 && response.status < 500 && response.status !== 429) {
        return onRefused(await answer(response).catch((refused) => refused));
      }
      if (response.status === 429) {
        wait = Math.min(60, Number(response.headers.get("retry-after")) || 0) * 1000;
        why = (await answer(response).catch((refused) => refused)).message;
      }
      if (!response.ok) throw new Error(`status ${response.status}`);
      onState(true);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        pause = 500;
        rest += value;
        const frames = rest.split("\n\n");
        rest = frames.pop();
        for (const frame of frames) {
          const event = { data: "" };
          for (const line of frame.split("\n")) {
            const at = line.indexOf(":");
            if (at <= 0) continue;
            const [field, text] = [line.slice(0, at), line.slice(at + 1).replace(/^ /, "")];
            if (field === "data") event.data += text;
            else event[field] = text;
          }
          if (event.id !== undefined) last = event.id;
          if (event.event === "end") return;
          if (event.data) onEvent(event);
        }
      }
    } catch (error) {
      if (signal.aborted) return;
    } finally {
      clearTimeout(timer);
      mine.abort();
    }
    if (left) continue;
    onState(false, why);
    await new Promise((resolve) => setTimeout(resolve, Math.max(pause, wait)));
    pause = Math.min(pause * 2, 15_000);
  }
}

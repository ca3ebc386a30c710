// Which view is shown, and keeping it true while events arrive.

import { denials, follow, get, learnWhatMayBeDone, session, whoHas } from "./api.js";
import { h, notice, settled } from "./dom.js";
import { overview } from "./overview.js";
import { deployment } from "./deployment.js";
import { history } from "./history.js";
import { environments } from "./environments.js";
import { routes } from "./routes.js";
import { approvals } from "./approvals.js";
import { delivery } from "./delivery.js";
import { logs } from "./logs.js";
import { webhooks } from "./webhooks.js";
import { ledger } from "./ledger.js";

const VIEWS = [
  { path: "", name: "Overview", show: overview },
  { path: "environments", name: "Environments", show: environments },
  { path: "routes", name: "Routes", show: routes },
  { path: "history", name: "History", show: history },
  { path: "approvals", name: "Approvals", show: approvals },
  { path: "delivery", name: "Delivery", show: delivery },
  { path: "logs", name: "Logs", show: logs },
  { path: "webhooks", name: "Webhooks", show: webhooks },
  { path: "ledger", name: "Ledger", show: ledger },
  { path: "deployments", show: deployment },
];

const content = document.getElementById("content");
let shown;
let opened = false;

// A part that is no encoded text is taken as it stands: nothing has such a name, and the view says so.
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, ...rest] = path.split("/");
  return { view, rest: rest.map(decoded), query: Object.fromEntries(new URLSearchParams(query)) };
}

async function show() {
  shown?.ended.abort();
  const at = address();
  const view = VIEWS.find((v) => v.path === at.view) ?? VIEWS[0];
  const current = (shown = { view, ended: new AbortController(), refresh: null });
  document.getElementById("nav").replaceChildren(...VIEWS.filter((v) => v.name).map((v) =>
    h("a", { href: `#/${v.path}`, "aria-current": v === view ? "page" : null }, v.name)));
  try {
    const made = await view.show({ ...at, signal: current.ended.signal });
    if (shown !== current) return;
    current.refresh = made.refresh;
    if (current.roles) due(0);
    document.title = `${made.title} · Daybook`;
    content.replaceChildren(made.node);
    // Who follows a link goes on at the top of what it leads to; who opens the page is left alone.
    if (opened) {
      content.focus({ preventScroll: true });
      scrollTo(0, 0);
    }
    opened = true;
  } catch (error) {
    if (shown === current && error.signIn) askWho(error);
    else if (shown === current && error.name !== "AbortError") content.replaceChildren(h("h1", {}, "This cannot be shown"), h("p", {}, error.message));
  }
}

// The token stays in this tab, once the server has taken it. It is never in an address.
function askWho(refusal) {
  // Nothing is taken from under the hands of who signs in already.
  if (content.querySelector("form.sign-in")) return;
  if (shown) shown.refresh = null;
  const why = h("p", { role: "status" }, refusal.message);
  const token = h("input", { type: "password", name: "token", autocomplete: "off", required: true, spellcheck: "false" });
  const form = h("form", { class: "filters sign-in", onsubmit: async (e) => {
    e.preventDefault();
    const given = token.value.trim();
    try {
      await whoHas(given);
      session.token = given;
      location.reload();
    } catch (error) {
      why.textContent = error.message;
      token.value = "";
    }
  } }, h("label", {}, "Token", token), h("button", {}, "Sign in"));
  content.replaceChildren(h("h1", {}, "Sign in"), why, form,
    h("p", { class: "quiet" }, "An administrator makes one with ", h("code", {}, "daybook token create"), "; this tab forgets it when it is closed."));
}

// Who it is, and the way out. It is there whatever the token is good for.
async function account() {
  const place = document.getElementById("account");
  if (!session.token) return;
  const name = h("span", {});
  place.replaceChildren(name, h("button", { onclick: () => {
    session.token = "";
    location.reload();
  } }, "Sign out"));
  const who = await whoHas(session.token).catch(() => null);
  name.textContent = who?.actor.id ?? "";
}

// Many events of one moment make one refresh, and nothing is taken from under somebody's hands.
const due = settled(refresh, 1000);
let putOff;
function changed(event) {
  const at = shown;
  if (!at?.refresh) return;
  // Of many events about the same one is as good as all.
  const { type, subject, correlationid } = event;
  at.pending ??= new Map();
  at.pending.set(`${type} ${subject} ${correlationid}`, event);
  due(120);
}

async function refresh() {
  const at = shown;
  if (!at?.refresh || !(at.pending || at.roles)) return;
  // Nor is it drawn again before it was drawn.
  if (at.busy || content.querySelector("input:focus, select:focus, textarea:focus") || document.querySelector("dialog[open]")) {
    clearTimeout(putOff);
    putOff = setTimeout(() => due(0), at.busy ? 200 : 1000);
    return;
  }
  // With other roles other things are offered, whatever happened.
  const events = at.roles ? null : [...at.pending.values()];
  at.pending = null;
  at.roles = false;
  at.busy = true;
  const focused = content.contains(document.activeElement) ? document.activeElement.id : "";
  try {
    await at.refresh(events);
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  } catch (error) {
    if (error.signIn) askWho(error);
    else if (error.name !== "AbortError") notice(error.message, true);
  } finally {
    at.busy = false;
  }
}

// What may be done: asked until it is answered, and again where it may be something else by now.
let again;
let pause = 5000;
async function learn() {
  clearTimeout(again);
  try {
    const other = await learnWhatMayBeDone();
    pause = 5000;
    if (!other || !shown) return;
    shown.roles = true;
    due(0);
  } catch (error) {
    if (error.signIn) return;
    clearTimeout(again);
    again = setTimeout(learn, pause);
    pause = Math.min(60_000, 2 * pause);
  }
}
const relearn = settled(learn, 2000);
denials.addEventListener("denied", () => relearn(0));
document.addEventListener("visibilitychange", () => { if (!document.hidden) relearn(300); });

// What was lost, and was recorded as lost, stands in the stream as a line that is no event.
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

async function watchLedger() {
  const line = document.getElementById("ledger");
  const tell = async (connected, why = "not connected; trying again") => {
    if (!connected) {
      line.className = "ledger broken";
      line.textContent = why;
      return;
    }
    const report = await get("ledger").catch(() => null);
    if (!report) return;
    const broken = report.condition.state === "broken";
    const doubted = report.condition.state === "doubted";
    line.className = broken || doubted ? "ledger broken" : "ledger";
    line.textContent = broken
      ? `BROKEN: ${report.condition.message}`
      : doubted
      ? `Doubted: ${report.condition.reason}`
      : `${report.head ?? report.position} events, ${report.signed?.size ?? 0} signed`;
  };
  let report;
  while (!report) {
    report = await get("ledger").catch(() => null);
    if (!report) {
      await tell(false);
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
  await tell(true);
  const telling = settled(() => tell(true), 5000);
  const never = new AbortController();
  follow("/api/v1/events?follow=true", (event) => {
    const written = parsed(event.data);
    if (written) changed(written);
    if (written?.type?.includes(".access.")) relearn(300);
    // The signature follows within a second.
    telling(1300);
  }, { last: report.position, signal: never.signal, onState: tell, onSignIn: askWho });
}

addEventListener("hashchange", show);
account();
watchLedger();
// Where it is not known in time, all is offered, and the server decides.
await Promise.race([learn(), new Promise((resolve) => setTimeout(resolve, 2000))]);
await show();

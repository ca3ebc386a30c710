// Webhooks: whom events of a project are sent to, what was sent, and what came of it.

import { follow, get, may, send, within } from "./api.js";
import { ask, connection, duration, facts, fillIn, h, moment, notice, onlyLooks, problem, projectChoices, refused, replace, row, settled, short, table, tag } from "./dom.js";
import { link } from "./overview.js";

/** Deliveries of one page. */
const PAGE = 50;
/** At most so many are kept in the page. */
const ROWS = 1000;
/** A page that has none is followed by the next one, so often at most. */
const EMPTY = 15;

export function webhooks({ rest: [id], query, signal }) {
  return id ? one(id, signal) : list(query, signal);
}

const PAUSED = {
  asked: "Somebody paused it. What comes meanwhile is sent once it is resumed.",
  gone: "The receiver answered 410 Gone. Resume it once it is there again.",
  failing: "Too much was set aside. Discard that or send it again, and then resume it.",
};

/** In a word: whether it is paused, has something to try again, or delivers. */
const state = (w) => (w.pause ? "paused" : w.retrying.length ? "retrying" : "delivering");
const states = (w) => [tag(state(w)), w.dead_letters.length ? [" ", h("span", { class: "tag bad" }, `${w.dead_letters.length} set aside`)] : null];

/** Which events are sent, in words. */
function sends(w) {
  const narrowed = [w.environment && `of the environment ${w.environment}`, w.service && `about the service ${w.service}`].filter(Boolean);
  return [w.kinds.length ? w.kinds.join(", ") : "all events", narrowed.length ? ` ${narrowed.join(", ")}` : "",
    w.deployment ? [" of the run of ", link(w.deployment)] : "", w.format === "cdevents" ? ", as CDEvents" : "", w.proof ? ", each with its proof" : ""];
}

/** Runs something soon, once, however often it is asked for; never after the view has gone. What is to
 *  be done later does not put off what is to be done soon. */
function soon(work, signal) {
  const run = () => { if (!signal.aborted) work().catch(() => {}); };
  const near = settled(run, 2000);
  let far;
  return (ms) => {
    if (ms <= 2000) return near(ms);
    clearTimeout(far);
    far = setTimeout(run, ms);
  };
}

/** When something is tried again, from now; not for ever, and not without end. */
const untilNext = (all) => {
  const times = all.flatMap((w) => w.retrying).map((r) => new Date(r.next_at ?? Date.now()) - Date.now());
  return times.length ? Math.min(60_000, Math.max(1000, Math.min(...times) + 700)) : null;
};

async function list(query, signal) {
  const { projects } = await get("projects", {}, signal);
  const cards = h("div");
  const offer = h("span");
  const looks = h("div");
  const chosen = h("select", { name: "project" }, [["", "all"], ...projectChoices(projects, query.project)].map(([value, text]) => h("option", { value, selected: value === (query.project ?? "") }, text)));
  const draw = async () => {
    const of = chosen.value;
    if (of && !projects.some((p) => p.name === of)) return replace(cards, h("p", { class: "problem" }, `There is no project ${of} that you may look at.`));
    const own = projects.map((p) => p.name).filter((name) => may("configure", name));
    replace(offer, own.length ? h("button", { type: "button", id: "new-webhook", onclick: () => createOne(own, chosen.value) }, "New webhook") : null);
    replace(looks, own.length ? null : onlyLooks("configure"));
    const { webhooks: all } = await get("webhooks", { project: of }, signal);
    if (signal.aborted || of !== chosen.value) return;
    replace(cards, all.length
      ? h("div", { class: "cards" }, all.map(card))
      : h("p", { class: "quiet" }, "Nothing is sent anywhere yet."));
    const next = untilNext(all);
    if (next !== null) again(next);
  };
  const again = soon(draw, signal);
  chosen.addEventListener("change", () => draw().catch((error) => { if (!signal.aborted) replace(cards, refused(error)); }));
  await draw();
  return {
    title: "Webhooks",
    node: h("div", {}, h("h1", {}, "Webhooks"),
      h("p", { class: "quiet" }, "Events of a project are sent to a URL as they are recorded: signed, at least once, in order within each deployment."),
      h("form", { class: "filters", onsubmit: (e) => e.preventDefault() }, h("label", {}, "Project", chosen), offer), looks, cards),
    // What came of sending an event is known a moment after it.
    refresh: async () => { await draw(); again(1500); },
  };
}

function card(w) {
  return h("article", { class: "card" },
    h("header", {}, h("h2", { class: "plain" }, h("a", { href: `#/webhooks/${w.id}`, class: "mono" }, w.url)), h("span", {}, states(w))),
    w.pause ? h("p", { class: "quiet" }, PAUSED[w.pause.reason]) : null,
    facts([
      ["project", w.project],
      ["sends", sends(w)],
      ["tries again", w.retrying.length ? `${w.retrying.length}, ${w.retrying[0].code ?? "not taken"}` : null],
      ["since", moment(w.created_at)],
    ]));
}

/** The fields that say what is sent where. */
function fields(w = {}) {
  const input = (name, text, { half, ...more } = {}) => h("label", { class: half ? "half" : "" }, text, h("input", { name, value: w[name] ?? "", autocomplete: "off", spellcheck: "false", ...more }));
  return [
    input("url", "URL: https, without user, query and fragment; it is kept in the ledger for ever", { type: "url", required: true }),
    input("environment", "Only of this environment", { half: true }), input("service", "Only about this service", { half: true }), input("deployment", "Only of the run of this deployment (its id)"),
    h("label", {}, "Only these types or aggregates (deployment.succeeded.v1, routing), with commas between", h("input", { name: "kinds", value: (w.kinds ?? []).join(", "), autocomplete: "off", spellcheck: "false" })),
    h("label", { class: "half" }, "Format", h("select", { name: "format" }, [["cloudevents", "CloudEvents, as stored"], ["cdevents", "CDEvents 0.5.1"]].map(([value, text]) => h("option", { value, selected: value === w.format }, text)))),
    input("tries", "Tries before an event is set aside", { half: true, type: "number", min: "1", max: "20", value: String(w.tries ?? 16) }),
    h("label", { class: "check" }, h("input", { type: "checkbox", name: "proof", checked: w.proof ?? false }), "With the proof that each is in the signed ledger"),
  ];
}

/** What was given in them, as the server takes it. */
function defined({ url, environment, service, deployment, kinds, format, tries, proof }) {
  const text = (value) => value?.trim() || null;
  return {
    url: url.trim(), format, environment: text(environment), service: text(service), deployment: text(deployment),
    kinds: kinds.split(/[\s,]+/).filter(Boolean), tries: tries ? Number(tries) : null, proof: proof === "on",
  };
}

async function createOne(projects, chosen) {
  const of = h("label", {}, "Project", h("select", { name: "project" }, projects.map((p) => h("option", { value: p, selected: p === chosen }, p))));
  const after = h("label", {}, "Events after this position: 0 for all; from now on, if empty", h("input", { name: "after", type: "number", min: "0" }));
  const made = await fillIn("New webhook", [of, ...fields(), after], {
    verb: "Create",
    submit: (given, order) => order("POST", "webhooks", { project: given.project, ...defined(given), ...(given.after ? { after: Number(given.after) } : {}) }),
  });
  if (!made) return;
  await showSecret(made.secret, "Deliveries are signed with this secret.");
  location.hash = `#/webhooks/${made.webhook.id}`;
}

/** Shows a secret. Nobody can look it up later, this page neither. */
function showSecret(secret, text) {
  const shown = h("input", { value: secret, readonly: true, class: "mono", "aria-label": "The secret", onfocus: () => shown.select() });
  const copied = h("span", { class: "quiet", role: "status" });
  const copy = async () => {
    shown.select();
    // A browser gives its clipboard to secure pages only.
    const done = await navigator.clipboard?.writeText(secret).then(() => true, () => false);
    copied.textContent = done ? "copied" : "it is selected: copy it from there";
  };
  return fillIn("The secret", [h("p", {}, text, " It is shown this once: keep it where the receiver finds it."), shown,
    h("div", { class: "row" }, h("button", { type: "button", onclick: copy }, "Copy"), copied)], { verb: "It is kept", leave: null, submit: async () => true });
}

async function one(id, signal) {
  const path = `webhooks/${encodeURIComponent(id)}`;
  const head = h("div");
  const wrong = h("div");
  const put = h("div");
  let webhook;
  // Once it is deleted there is nothing to ask for any more.
  let deleted = false;
  const draw = async () => {
    if (deleted) return;
    webhook = await get(path, {}, signal);
    replace(head, top(webhook));
    replace(put, aside(webhook));
    const next = untilNext([webhook]);
    if (next !== null) again(next);
  };
  const again = soon(draw, signal);
  /** Does something, and shows what is refused where it was asked for. */
  const act = async (verb, body, done) => {
    wrong.replaceChildren();
    try {
      const answer = await send("POST", `${path}/${verb}`, body ?? {});
      notice(typeof done === "function" ? done(answer) : done);
      await draw();
    } catch (error) {
      wrong.replaceChildren(refused(error));
    }
  };
  const button = (name, text, onclick, danger) => h("button", { type: "button", id: `webhook-${name}`, class: danger ? "danger" : "", onclick }, text);

  const rotate = async () => {
    const hours = h("label", {}, "For how many hours deliveries are signed with the old one, too (0: it ends now)", h("input", { name: "hours", type: "number", min: "0", max: "168", step: "any", value: "24", required: true }));
    const made = await fillIn("Another secret?", [h("p", {}, "Until the time is over each delivery has both signatures; then the old secret is erased. If it leaked, let it end now."), hours], {
      verb: "Make another", submit: ({ hours: h }, order) => order("POST", `${path}/rotate`, { overlap_seconds: Math.round(Number(h) * 3600) }),
    });
    if (!made) return;
    await showSecret(made.secret, "Deliveries are signed with this secret from now on.");
    await draw();
  };
  const change = async () => {
    // What is filled in stands on what was read now, whatever comes while the dialog is open.
    const { etag } = webhook;
    const done = await fillIn("Change the webhook", [h("p", {}, "What was sent already is not sent again."), ...fields(webhook)], { verb: "Change", submit: (given, order) => order("PUT", path, defined(given), etag ? { "if-match": etag } : {}) });
    if (done) await draw();
  };
  const remove = async () => {
    const done = await ask("Delete this webhook?", `Nothing is sent to ${webhook.url} any more, and its secrets are erased. The ledger keeps its history.`, {
      danger: true, verb: "Delete", why: false,
      submit: (_, order) => {
        deleted = true;
        return order("DELETE", path).catch((error) => {
          deleted = false;
          throw error;
        });
      },
    });
    if (!done) return;
    notice("deleted");
    location.hash = "#/webhooks";
  };
  const top = (w) => [
    h("h1", {}, h("span", { class: "mono" }, w.url), " ", states(w)),
    h("div", { class: "cards" },
      h("section", { class: "card", "aria-label": "What is sent" },
        w.pause ? h("div", { class: "problem" }, h("strong", {}, "Paused "), moment(w.pause.since), h("p", {}, PAUSED[w.pause.reason])) : null,
        facts([
          ["project", w.project], ["id", h("span", { class: "mono" }, short(w.id))], ["sends", sends(w)],
          ["after", w.after ? h("a", { href: `#/ledger/${w.after}` }, `event ${w.after}`) : "all of the history"],
          ["tries", w.tries], ["since", moment(w.created_at)],
          ["secret", `number ${w.secret_version}`],
          ["two secrets", w.overlap_until ? ["until ", moment(w.overlap_until)] : null],
        ])),
      w.retrying.length ? h("section", { class: "card", "aria-label": "Tried again" }, h("h2", { class: "plain" }, "Tried again"),
        h("ul", {}, w.retrying.slice(0, 8).map((r) => h("li", {}, h("a", { href: `#/ledger/${r.position}` }, `event ${r.position}`), ` ${r.kind}: `, h("code", {}, r.code ?? "not taken"), ` after ${r.tries} of ${w.tries} tries`,
          r.next_at && !w.pause ? [", again ", moment(r.next_at)] : null))),
        w.retrying.length > 8 ? h("p", { class: "quiet" }, `and ${w.retrying.length - 8} more`) : null) : null),
    may("configure", w.project)
      ? h("div", { class: "row actions" },
        w.pause ? button("resume", "Resume", () => act("resume", {}, "sending goes on")) : [
          button("test", "Send a test", () => act("test", {}, (a) => `a test is being sent: event ${a.position}`)),
          button("pause", "Pause", () => act("pause", {}, "paused"))],
        button("rotate", "Another secret…", rotate), button("change", "Change…", change), button("delete", "Delete…", remove, true))
      : onlyLooks("configure"),
  ];
  /** What was set aside undelivered, and what can be done about it. */
  const aside = (w) => {
    if (w.dead_letters.length === 0) return null;
    const allowed = may("configure", w.project);
    const letters = (positions) => (positions ? { positions } : {});
    const replay = (positions) => act("replay", letters(positions), positions ? `event ${positions[0]} is being sent again` : "all are being sent again");
    const discard = async (positions) => {
      const what = positions ? `Event ${positions[0]} is` : `${w.dead_letters.length} events are`;
      const done = await ask("Discard?", `${what} never sent. The ledger keeps what was set aside, and who discarded it.`, {
        danger: true, verb: "Discard", why: false, submit: (_, order) => order("POST", `${path}/discard`, letters(positions)),
      });
      if (!done) return;
      notice("discarded");
      await draw();
    };
    return [h("h2", {}, "Set aside undelivered"),
      allowed ? h("div", { class: "row actions" }, button("replay-all", "Send all again", () => replay()), button("discard-all", "Discard all…", () => discard(), true)) : null,
      table("Events that were set aside", ["Event", "Tries", "Last answer", "Since", ...(allowed ? ["What to do"] : [])], w.dead_letters.map((d) => [
        h("a", { href: `#/ledger/${d.position}` }, `event ${d.position}`), String(d.tries), h("code", {}, d.code), moment(d.since),
        ...(allowed ? [d.replaying ? tag("retrying", "it is being sent again") : h("div", { class: "row" },
          button(`replay-${d.position}`, "Send again", () => replay([d.position])), button(`discard-${d.position}`, "Discard…", () => discard([d.position]), true))] : [])]), "", "stack")];
  };

  const sent = deliveries(path, signal, (tried) => again(tried.outcome === "delivered" ? 400 : 200));
  await Promise.all([draw(), sent.begin()]);
  return {
    title: `Webhook ${short(id)}`,
    node: h("div", {}, head, wrong, put, sent.node),
    refresh: (events) => {
      if (!events) return draw();
      const own = events.filter((e) => e.type.includes(".subscription.") && e.subject.includes(webhook.id));
      if (!deleted && own.some((e) => e.type.endsWith(".subscription.deleted.v1"))) {
        deleted = true;
        sent.end();
        replace(head, h("h1", {}, h("span", { class: "mono" }, webhook.url)), h("p", {}, "This webhook was deleted. Nothing is sent any more; ", h("a", { href: "#/webhooks" }, "all webhooks"), "."));
        replace(put);
      }
      return own.length ? draw() : null;
    },
  };
}

const COLUMNS = ["Time", "Event", "Try", "Outcome", "Status", "Took", "Why"];

/** Every try, the newest first, as it is made. */
function deliveries(path, signal, onTry) {
  const body = h("tbody");
  const empty = h("p", { class: "quiet" }, "Nothing was sent yet.");
  const shown = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Deliveries" },
    h("table", { class: "stack", "aria-label": "Deliveries" }, h("thead", {}, h("tr", {}, COLUMNS.map((c) => h("th", { scope: "col" }, c)))), body));
  const older = h("button", { type: "button", hidden: true, onclick: () => page(following) }, "Show older ones");
  const full = h("p", { class: "quiet", hidden: true }, `More than ${ROWS.toLocaleString()} are not shown.`);
  const broken = connection();
  const wrong = h("div");
  const outcome = h("select", { name: "outcome" }, [["", "all"], ["delivered", "delivered"], ["failed", "failed"], ["dead_lettered", "set aside"], ["gone", "gone"], ["discarded", "discarded"]].map(([value, text]) => h("option", { value }, text)));
  let next;
  let following;
  const cells = (d) => row(COLUMNS, [
    moment(d.time), h("td", {}, h("a", { href: `#/ledger/${d.position}` }, `event ${d.position}`), h("div", { class: "quiet" }, d.kind), d.deployment ? link(d.deployment) : null),
    String(d.number), tag(d.outcome === "dead_lettered" ? "set_aside" : d.outcome), d.status ? String(d.status) : "none", h("td", { class: "nowrap" }, duration(d.millis)),
    h("td", { class: "wide" }, d.message ?? d.code ?? "", d.next_at ? h("div", { class: "quiet" }, "again ", moment(d.next_at)) : null)]);
  const tell = () => {
    const rows = body.children.length;
    empty.hidden = rows > 0;
    empty.textContent = next ? "None was found among those looked at; there are older ones." : outcome.value ? "None has this outcome." : "Nothing was sent yet.";
    shown.hidden = rows === 0;
    full.hidden = rows < ROWS || !next;
    older.hidden = rows >= ROWS || !next;
  };
  /** Keeps at most so many rows; those that go are older ones again. */
  const shorten = () => {
    while (body.children.length > ROWS) body.lastChild.remove();
    next = Number(body.lastChild.dataset.seq);
  };
  const line = (d) => {
    const made = cells(d);
    made.dataset.seq = d.seq;
    return made;
  };
  /** The next page, of the list that `mine` is of. With a filter, or where lines were removed, a page may
   *  have none: then the one after it is asked for. */
  const page = async (mine) => {
    wrong.replaceChildren();
    older.disabled = true;
    let first;
    try {
      for (let none = 0; none < EMPTY; none += 1) {
        const before = next;
        const found = await get(`${path}/deliveries`, { outcome: outcome.value, limit: PAGE, before }, mine.signal);
        if (mine.signal.aborted) return;
        first ??= found;
        // Rows that came meanwhile moved the end.
        if (next !== before) break;
        body.append(...found.deliveries.map(line));
        next = found.next;
        if (body.children.length > ROWS) shorten();
        if (found.deliveries.length || !next) break;
      }
      tell();
    } catch (error) {
      if (mine.signal.aborted) return;
      tell();
      empty.hidden = true;
      wrong.replaceChildren(refused(error));
    }
    older.disabled = false;
    return first;
  };
  const begin = async () => {
    following?.abort();
    const mine = (following = within(signal));
    body.replaceChildren();
    next = undefined;
    for (const element of [shown, older, full]) element.hidden = true;
    empty.hidden = false;
    empty.textContent = "Looking…";
    broken.onState(true);
    const query = outcome.value ? `?outcome=${outcome.value}` : "";
    const first = await page(mine);
    if (!first || mine.signal.aborted) return;
    follow(`/api/v1/${path}/deliveries${query}`, (event) => {
      const tried = JSON.parse(event.data);
      body.prepend(line(tried));
      if (body.children.length > ROWS) shorten();
      tell();
      onTry(tried);
    }, { last: first.newest, signal: mine.signal, onState: broken.onState, onRefused: (error) => wrong.replaceChildren(refused(error)) });
  };
  outcome.addEventListener("change", begin);
  return { begin, end: () => following?.abort(), node: h("div", {}, h("h2", {}, "Deliveries"), h("form", { class: "filters", onsubmit: (e) => e.preventDefault() }, h("label", {}, "Outcome", outcome)), wrong, broken.node, empty, shown, full, h("p", {}, older)) };
}

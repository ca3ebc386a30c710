// Proves in this browser that an event is in the signed ledger: RFC 6962, tiles as in
// c2sp.org/tlog-tiles, checkpoints as in c2sp.org/tlog-checkpoint. Nothing that the server says
// of an event is taken for granted but its own bytes.

const TILE = 256;

async function sha256(...parts) {
  const all = new Uint8Array(parts.reduce((n, p) => n + p.length, 0));
  let at = 0;
  for (const part of parts) { all.set(part, at); at += part.length; }
  return new Uint8Array(await crypto.subtle.digest("SHA-256", all));
}

export const leafHash = (bytes) => sha256(Uint8Array.of(0), bytes);
export const nodeHash = (left, right) => sha256(Uint8Array.of(1), left, right);

const base64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
export const hex = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
export const same = (a, b) => a.length === b.length && a.every((x, i) => x === b[i]);

/** 1234067 as `x001/x234/067`. */
export function tilePath(index) {
  const groups = [String(index % 1000).padStart(3, "0")];
  for (let rest = Math.floor(index / 1000); rest > 0; rest = Math.floor(rest / 1000)) {
    groups.unshift(`x${String(rest % 1000).padStart(3, "0")}`);
  }
  return groups.join("/");
}

/** Reads a tile as it is in a tree of this size. */
async function tile(read, kind, level, index, size) {
  const there = Math.floor(size / TILE ** level) - index * TILE;
  const partial = there < TILE ? `.p/${there}` : "";
  return read(`tile/${kind}/${tilePath(index)}${partial}`);
}

/** The stored bytes of the event at an index. */
export async function entry(read, index, size) {
  const bundle = await tile(read, "entries", 0, Math.floor(index / TILE), size);
  let at = 0;
  for (let skip = index % TILE; ; skip--) {
    const length = bundle[at] * 256 + bundle[at + 1];
    if (skip === 0) return bundle.slice(at + 2, at + 2 + length);
    at += 2 + length;
  }
}

/** The hash of a whole subtree of 2^height leaves that begins at `from`. */
async function subtree(read, from, height, size) {
  const level = Math.floor(height / 8);
  const first = from / TILE ** level;
  const hashes = await tile(read, String(level), level, Math.floor(first / TILE), size);
  const count = 2 ** (height % 8);
  let row = [];
  for (let i = 0; i < count; i++) {
    const at = ((first % TILE) + i) * 32;
    row.push(hashes.slice(at, at + 32));
  }
  while (row.length > 1) {
    const next = [];
    for (let i = 0; i < row.length; i += 2) next.push(await nodeHash(row[i], row[i + 1]));
    row = next;
  }
  return row[0];
}

const below = (n) => 2 ** Math.floor(Math.log2(n - 1));

/** The hash of `count` leaves from `from` on. */
async function range(read, from, count, size) {
  if (Number.isInteger(Math.log2(count))) return subtree(read, from, Math.log2(count), size);
  const left = below(count);
  return nodeHash(await range(read, from, left, size), await range(read, from + left, count - left, size));
}

/** The audit path of a leaf (RFC 6962, 2.1.1), from the leaf to the root. */
export async function auditPath(read, index, size) {
  const path = [];
  let [from, count] = [0, size];
  while (count > 1) {
    const left = below(count);
    if (index - from < left) {
      path.unshift({ side: "right", hash: await range(read, from + left, count - left, size) });
      count = left;
    } else {
      path.unshift({ side: "left", hash: await range(read, from, left, size) });
      [from, count] = [from + left, count - left];
    }
  }
  return path;
}

/** The root that a leaf and its path lead to. */
export async function rootOf(leaf, path) {
  let hash = leaf;
  for (const { side, hash: other } of path) {
    hash = side === "left" ? await nodeHash(other, hash) : await nodeHash(hash, other);
  }
  return hash;
}

/** A checkpoint taken apart. */
export function checkpoint(text) {
  const end = text.indexOf("\n\n");
  const [origin, size, root] = text.slice(0, end).split("\n");
  const signatures = text.slice(end + 2).split("\n").filter((l) => l.startsWith("— ")).map((line) => {
    const [, name, value] = line.split(" ");
    return { name, value: base64(value) };
  });
  return { origin, size: Number(size), root: base64(root), signed: new TextEncoder().encode(text.slice(0, end + 1)), signatures };
}

/** Whether one of the keys (`name+id+base64`, one a line) has signed it; null if this browser cannot tell. */
export async function isSigned(note, keys) {
  try {
    for (const line of keys.split("\n").filter(Boolean)) {
      const [name, , ...rest] = line.split("+");
      const key = base64(rest.join("+"));
      if (key[0] !== 1) continue;
      const imported = await crypto.subtle.importKey("raw", key.slice(1), "Ed25519", false, ["verify"]);
      for (const s of note.signatures.filter((s) => s.name === name)) {
        if (await crypto.subtle.verify("Ed25519", imported, s.value.slice(4), note.signed)) return true;
      }
    }
    return false;
  } catch {
    return null;
  }
}

/** Proves an event: what was done, step by step, and whether each held. */
export async function prove(position, read, readText) {
  const note = checkpoint(await readText("checkpoint"));
  const index = position - 1;
  if (index >= note.size) return { note, steps: [{ ok: false, text: `${note.size} events are signed so far; this one is not yet among them` }] };
  const bytes = await entry(read, index, note.size);
  const leaf = await leafHash(bytes);
  const path = await auditPath(read, index, note.size);
  const root = await rootOf(leaf, path);
  const signed = await isSigned(note, await readText("keys"));
  const steps = [
    { ok: true, text: `${bytes.length} stored bytes have the leaf hash ${hex(leaf).slice(0, 16)}…` },
    { ok: same(root, note.root), text: `with the ${path.length} hashes of its path they make the root ${hex(root).slice(0, 16)}… of ${note.size} events` },
    { ok: signed !== false, text: signed === null ? "this browser cannot verify Ed25519: the signature was not checked" : signed ? `that root is signed by ${note.origin}` : "no known key has signed that root" },
  ];
  return { note, bytes, steps, proven: steps.every((s) => s.ok) && signed === true };
}

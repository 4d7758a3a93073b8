"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { policy: data.policies.length - 1, metric: "kl_policy_ref", cls: null, correct: null, query: "", byMean: true, place: null };
const signed = new Set(["log_ratio"]);
let response = null; // the open one, unpacked
let active = 0; // the token that the keyboard is on

const number = (value) => (value === null ? "∞" : Math.abs(value) >= 1e-3 || value === 0 ? value.toPrecision(3) : value.toExponential(1));
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "␣");

function element(tag, text, properties = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return Object.assign(node, properties);
}

async function unpack(place) {
  const bytes = Uint8Array.from(atob($(`block-${place}`).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function kept(row) {
  return (
    (state.correct === null || row.correct === state.correct) &&
    (state.cls === null || row.classes.includes(state.cls)) &&
    (state.query === "" || `${row.id}\n${row.text}`.toLowerCase().includes(state.query))
  );
}

function showList() {
  const mean = (row) => row.means[state.metric][state.policy];
  const size = (row) => (mean(row) === null ? Infinity : mean(row));
  const rows = data.responses.filter(kept);
  if (state.byMean) rows.sort((a, b) => size(b) - size(a));
  const body = document.createDocumentFragment();
  for (const row of rows) {
    const line = element("tr");
    line.dataset.place = row.place;
    line.setAttribute("aria-selected", row.place === state.place);
    const name = element("td");
    name.append(element("button", row.id, { type: "button", onclick: () => open(row.place) }));
    const right = row.correct === null ? "–" : row.correct ? "✓" : "✗";
    line.append(name, element("td", right), element("td", row.tokens), element("td", number(mean(row))), element("td", row.spikes[state.policy]));
    body.append(line);
  }
  $("list").replaceChildren(body);
  $("count").textContent = `(${rows.length} of ${data.responses.length})`;
  return rows;
}

function showMoved() {
  const rows = new Map(data.responses.map((row) => [row.place, row]));
  const body = document.createDocumentFragment();
  for (const token of data.moved) {
    if (token.policy !== data.policies[state.policy] || !kept(rows.get(token.place))) continue;
    if (state.cls !== null && token.class !== data.classes[state.cls]) continue;
    const line = element("tr");
    const name = element("td");
    name.append(element("button", token.id, { type: "button", onclick: () => open(token.place, token.position) }));
    const context = element("td");
    context.append(visible(token.before), element("mark", visible(token.token)), visible(token.after));
    line.append(name, context, element("td", token.class), ...["kl_policy_ref", "kl_ref_policy", "log_ratio"].map((m) => element("td", number(token[m]))));
    body.append(line);
  }
  $("moved").replaceChildren(body);
}

async function open(place, token = 0) {
  state.place = place;
  const unpacked = await unpack(place);
  if (state.place !== place) return; // another one was opened meanwhile
  response = unpacked;
  const row = data.responses.find((other) => other.place === place);
  $("view-title").textContent = `Response ${row.id}` + (row.correct === null ? "" : row.correct ? " (right)" : " (wrong)");
  $("prompt").textContent = response.prompt;
  const spans = response.tokens.map((text, i) => {
    const span = element("span", text, { className: "t" });
    span.dataset.i = i;
    span.setAttribute("role", "option");
    return span;
  });
  $("tokens").replaceChildren(...spans);
  for (const line of $("list").children) line.setAttribute("aria-selected", Number(line.dataset.place) === place);
  colour();
  select(token, token > 0);
}

function colour() {
  if (!response) return;
  const policy = response.policies[state.policy];
  const values = policy[state.metric];
  const scale = data.scales[state.metric];
  const spikes = new Set(policy.spikes);
  [...$("tokens").children].forEach((span, i) => {
    const size = values[i] === null ? 1 : Math.min(1, Math.abs(values[i]) / scale);
    span.style.setProperty("--h", (0.85 * Math.sqrt(size)).toFixed(3));
    span.classList.toggle("cold", signed.has(state.metric) && values[i] < 0);
    span.classList.toggle("spike", spikes.has(i));
    span.classList.toggle("faded", state.cls !== null && response.classes[i] !== state.cls);
  });
  const key = (variable) => {
    const bar = element("span", "", { className: "key" });
    bar.style.setProperty("--full", `var(${variable})`);
    return bar;
  };
  const sides = signed.has(state.metric) ? ["; overlined, and ", key("--cold"), ": below 0, the policy finds it less probable"] : [];
  $("legend").replaceChildren(`Colour: ${$("metric").selectedOptions[0].textContent}, 0 `, key("--hot"), ` ${number(scale)} and more, by its square root; one scale for all checkpoints`, ...sides, ".");
}

function select(i, focus) {
  const spans = $("tokens").children;
  spans[active]?.removeAttribute("tabindex");
  spans[active]?.setAttribute("aria-selected", "false");
  active = Math.max(0, Math.min(i, spans.length - 1));
  spans[active].tabIndex = 0; // one stop for the tab key; the arrow keys move it
  spans[active].setAttribute("aria-selected", "true");
  if (!focus) return;
  spans[active].focus();
  showTip(spans[active]); // of a token that is tapped again, which has the focus already
}

function top5(title, top, i) {
  const table = element("table");
  table.append(element("caption", title));
  top.top_ids[i].forEach((word, k) => {
    const line = element("tr");
    line.append(element("th", visible(response.words[word]), { scope: "row" }), element("td", number(top.top_probs[i][k])));
    table.append(line);
  });
  return table;
}

function showTip(span) {
  const i = Number(span.dataset.i);
  const policy = response.policies[state.policy];
  const reference = response.reference;
  const tip = $("tip");
  const head = element("div", `“${visible(response.tokens[i])}”, token ${i}, ${data.classes[response.classes[i]]}`);
  const facts = element("div");
  facts.append(
    `P: probability ${number(policy.prob_policy[i])}, rank ${policy.rank_policy[i]}, entropy ${number(policy.entropy_policy[i])}`,
    element("br"),
    `R: probability ${number(reference.prob_ref[i])}, rank ${reference.rank_ref[i]}, entropy ${number(policy.entropy_ref[i])}`,
    element("br"),
    `KL(P||R) ${number(policy.kl_policy_ref[i])}, KL(R||P) ${number(policy.kl_ref_policy[i])}, JS ${number(policy.js[i])}, TV ${number(policy.tv[i])}, log-ratio ${number(policy.log_ratio[i])}`,
  );
  const tops = element("div", "", { className: "tops" });
  tops.append(top5(`P, ${data.policies[state.policy]}`, policy, i), top5("R, reference", reference, i));
  tip.replaceChildren(head, facts, tops);
  tip.hidden = false;
  const box = span.getClientRects()[0];
  const left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
}

const hideTip = () => ($("tip").hidden = true);

$("tokens").addEventListener("pointerover", (event) => event.target.classList.contains("t") && showTip(event.target));
$("tokens").addEventListener("pointerout", hideTip);
$("tokens").addEventListener("focusin", (event) => event.target.classList.contains("t") && showTip(event.target));
$("tokens").addEventListener("focusout", hideTip);
$("tokens").addEventListener("click", (event) => event.target.classList.contains("t") && select(Number(event.target.dataset.i), true));
$("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
  if (step !== undefined) {
    event.preventDefault();
    select(active + step, true);
  } else if (event.key === "Escape") hideTip();
});
$("policy").addEventListener("input", (event) => {
  state.policy = Number(event.target.value);
  showPolicy();
  showList();
  showMoved();
  colour();
});
$("metric").addEventListener("change", (event) => {
  state.metric = event.target.value;
  showList();
  colour();
});
$("class").addEventListener("change", (event) => {
  state.cls = event.target.value === "" ? null : Number(event.target.value);
  showList();
  showMoved();
  colour();
});
$("correct").addEventListener("change", (event) => {
  state.correct = event.target.value === "" ? null : event.target.value === "true";
  showList();
  showMoved();
});
$("search").addEventListener("input", (event) => {
  state.query = event.target.value.trim().toLowerCase();
  showList();
  showMoved();
});
$("sort").addEventListener("click", (event) => {
  state.byMean = !state.byMean;
  event.target.setAttribute("aria-pressed", state.byMean);
  showList();
});
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme === "dark";
  root.dataset.theme = dark ? "light" : "dark";
});

function showPolicy() {
  $("policy-name").textContent = data.policies[state.policy];
  $("policy").setAttribute("aria-valuetext", data.policies[state.policy]);
}

showPolicy();
showMoved();
const shown = showList();
if (shown.length) open(shown[0].place);

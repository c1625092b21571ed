"use strict";
const mains = [...document.querySelectorAll("main")];
const titles = new Map(mains.map((main) => [main.lang, main.dataset.title]));
const data = JSON.parse(document.getElementById("data").textContent);
const EDGES = [1, 2, 4, 8, 12]; // bits at which a token's colour changes

function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* Languages */

function show(lang) {
  for (const main of mains) {
    main.hidden = main.lang !== lang;
    if (!main.hidden) drawSurprisal(main);
  }
  document.documentElement.lang = lang;
  document.title = titles.get(lang);
}

/* Text coloured by surprisal */

function drawSurprisal(main) {
  for (const place of main.querySelectorAll("[data-surprisal]:not([data-drawn])")) {
    place.dataset.drawn = "";
    const found = data.runs[Number(place.dataset.surprisal)].surprisal;
    if (found) new SurprisalView(place, found, data.words[main.lang], main.lang);
  }
}

class SurprisalView {
  constructor(place, found, words, lang) {
    this.found = found;
    this.words = words;
    this.numbers = (value, digits) => value.toLocaleString(lang, { minimumFractionDigits: digits, maximumFractionDigits: digits });
    this.document = 0;
    this.token = -1;
    this.step = found.steps.length - 1;
    this.choice = element("select", { "aria-label": words.document });
    found.documents.forEach((one, i) => this.choice.append(element("option", { value: i }, one.id)));
    this.slider = element("input", { type: "range", min: 0, max: this.step, step: 1, value: this.step });
    this.output = element("output");
    this.panels = [0, 1].map(() => element("div", { class: "tokens", tabindex: "0", role: "group", translate: "no" }));
    this.heads = [element("span", { class: "note" }, words.before), element("span", { class: "note" })];
    this.detail = element("div", { class: "detail", "aria-live": "polite" }, words.choose_token);
    const controls = element("div", { class: "controls" }, element("label", {}, words.document + " ", this.choice));
    if (found.steps.length > 1) {
      const label = place.closest("main").dataset.showStep;
      controls.append(element("label", { class: "slider" }, label + " ", this.slider, this.output));
    }
    const columns = this.heads.map((head, i) => element("div", {}, head, this.panels[i]));
    if (found.steps.length < 2) columns.shift();
    place.replaceChildren(controls, element("div", { class: "pair" }, ...columns), this.detail);
    this.choice.addEventListener("change", () => { this.document = Number(this.choice.value); this.token = -1; this.draw(); });
    this.slider.addEventListener("input", () => { this.step = Number(this.slider.value); this.draw(); });
    for (const panel of this.panels) {
      for (const kind of ["pointerover", "click"]) {
        panel.addEventListener(kind, (event) => {
          const token = event.target.closest("[data-token]");
          if (token) this.choose(Number(token.dataset.token));
        });
      }
      panel.addEventListener("keydown", (event) => this.move(event));
    }
    this.draw();
  }

  at(side) {
    return side === 0 ? 0 : this.step;
  }

  draw() {
    const now = fill(this.words.at_step, { step: this.numbers(this.found.steps[this.step], 0) });
    this.output.value = now;
    this.heads[0].textContent = `${this.words.before} (${fill(this.words.at_step, { step: this.numbers(this.found.steps[0], 0) })})`;
    this.heads[1].textContent = now;
    const { tokens, scores } = this.found.documents[this.document];
    this.panels.forEach((panel, side) => {
      panel.setAttribute("aria-label", this.heads[side].textContent);
      panel.replaceChildren(...tokens.map((text, i) => {
        const bits = scores[this.at(side)][i][0] / 1000;
        const level = EDGES.filter((edge) => bits >= edge).length;
        return element("span", { class: `t s${level}`, "data-token": i }, this.visible(this.found.texts[text], true));
      }));
    });
    this.choose(this.token);
  }

  visible(text, inText = false) {
    if (text === "" || (text === "\ufffd" && !inText)) return inText ? "·" : this.words.part_of_character;
    return inText ? text.replace(/\n/g, "⏎\n") : text.replace(/\n/g, "⏎").replace(/^ /, "␣");
  }

  move(event) {
    const last = this.found.documents[this.document].tokens.length - 1;
    const to = { ArrowRight: this.token + 1, ArrowLeft: this.token - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(last, to)));
  }

  choose(token) {
    this.token = token;
    for (const panel of this.panels) {
      panel.querySelector(".on")?.classList.remove("on");
      if (token >= 0) panel.children[token].classList.add("on");
    }
    if (token < 0) {
      this.detail.replaceChildren(this.words.choose_token);
      return;
    }
    const sides = this.found.steps.length > 1 ? [0, 1] : [1];
    this.detail.replaceChildren(element("div", { class: "pair" }, ...sides.map((side) => this.table(side))));
  }

  table(side) {
    const { tokens, scores } = this.found.documents[this.document];
    const [thousandths, rank, ...likeliest] = scores[this.at(side)][this.token];
    const bits = thousandths / 1000;
    const percent = (share) => `${this.numbers(100 * share, share < 0.0995 ? 2 : 1)}%`;
    const row = (name, value) => element("tr", {}, element("th", { scope: "row" }, name), element("td", { class: "number" }, value));
    const body = element("tbody", {},
      row(this.words.probability, percent(2 ** -bits)),
      row(this.words.surprisal, `${this.numbers(bits, 2)} ${this.words.bits}`),
      row(this.words.rank, this.numbers(rank, 0)));
    const list = element("ol");
    for (let i = 0; i < likeliest.length; i += 2) {
      const text = this.visible(this.found.texts[likeliest[i]]);
      list.append(element("li", {}, element("code", { translate: "no" }, text), " ", percent(likeliest[i + 1] / 10000)));
    }
    const name = element("code", { translate: "no" }, this.visible(this.found.texts[tokens[this.token]]));
    const caption = element("caption", {}, name, ` ${this.heads[side].textContent}`);
    const rest = element("div", { class: "likeliest" }, element("span", { class: "note" }, `${this.words.likeliest}:`), list);
    return element("div", {}, element("table", {}, caption, body), rest);
  }
}

/* Generated text at the step of the slider */

function showSamples(slider) {
  const { steps, texts } = data.runs[Number(slider.dataset.run)].samples;
  if (!steps.length) return;
  const main = slider.closest("main");
  const at = Number(slider.value);
  const label = fill(data.words[main.lang].at_step, { step: steps[at].toLocaleString(main.lang) });
  slider.parentElement.querySelector("output").value = label;
  for (const place of slider.closest("[data-samples]").querySelectorAll("[data-growing]")) {
    const found = texts[Number(place.dataset.growing)][at];
    const head = place.querySelector(".note");
    head.textContent = label;
    const paragraph = place.querySelector("p");
    paragraph.className = "";
    paragraph.replaceChildren(...(found ? [element("mark", {}, found[0]), found[1]] : ["–"]));
  }
}

/* Copying */

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // A page opened from the disk may have no clipboard: the older way still works there.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.show) {
    show(button.dataset.show);
    document.querySelector("main:not([hidden]) [data-show]").focus();
  } else if (button.dataset.copy) {
    const done = await copy(document.getElementById(button.dataset.copy).textContent);
    const status = button.parentElement.querySelector("[role=status]");
    status.textContent = done ? button.dataset.done : button.dataset.failed;
    setTimeout(() => { status.textContent = ""; }, 2500);
    button.focus();
  }
});

document.addEventListener("input", (event) => {
  if (event.target.dataset.slider === "samples") showSamples(event.target);
  if ("axis" in event.target.dataset) event.target.closest("figure").classList.toggle("other-axis", event.target.checked);
});

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("main:not([hidden]) details")) details.open = true;
});

/* A reload may bring back where a slider or a box stood: begin as the page was written. */
for (const input of document.querySelectorAll("input")) {
  input.value = input.defaultValue;
  input.checked = input.defaultChecked;
}
const root = document.documentElement;
const follows = "followsBrowser" in root.dataset;
show(follows ? (navigator.language.toLowerCase().startsWith("pt") ? "pt-BR" : "en") : root.lang);

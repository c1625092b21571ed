"use strict";
const titles = new Map([...document.querySelectorAll("main")].map((main) => [main.lang, main.dataset.title]));

function show(lang) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.lang !== lang;
  document.documentElement.lang = lang;
  document.title = titles.get(lang);
}

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

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("main:not([hidden]) details")) details.open = true;
});

"use strict";
const steps = [...document.querySelectorAll(".step")];
const area = (step) => step.querySelector("textarea");
const first = new Map(steps.map((step) => [step, area(step).defaultValue]));
let saved = true;

// Words that stood there and were emptied are taken away (null); what was empty stays unanswered.
function words(step) {
  return area(step).value.trim() || (first.get(step).trim() ? null : "");
}

function lines() {
  return steps.map((step) => JSON.stringify({
    sample: step.dataset.sample,
    step: Number(step.dataset.step),
    digest: step.dataset.digest,
    reasoning: words(step),
  })).join("\n") + "\n";
}

function look(step) {
  const text = area(step).value.trim();
  step.classList.toggle("changed", text !== first.get(step).trim());
  const told = words(step) === null ? "the words are taken away" : "";
  step.querySelector(".words").textContent = text ? `${text.split(/\s+/).length} words` : told;
}

function count() {
  const written = steps.filter((step) => area(step).value.trim()).length;
  const changed = steps.filter((step) => step.classList.contains("changed")).length;
  document.getElementById("count").textContent =
    `${written} of ${steps.length} steps have words, ${changed} changed here${saved ? "" : ", not saved"}`;
}

function filled() {
  for (const step of steps) step.classList.toggle("filled", area(step).value.trim() !== "");
}

for (const step of steps) {
  area(step).addEventListener("input", () => { saved = false; look(step); count(); });
  look(step);
}
document.getElementById("open").addEventListener("change", (event) => {
  filled();
  document.body.classList.toggle("only-open", event.target.checked);
});
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.download = "answers.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
  saved = true;
  count();
});
document.getElementById("load").addEventListener("change", async (event) => {
  const of = new Map(steps.map((step) => [`${step.dataset.sample}\n${step.dataset.step}\n${step.dataset.digest}`, step]));
  let taken = 0, left = 0;
  for (const line of (await event.target.files[0].text()).split("\n")) {
    if (!line.trim()) continue;
    let answer = null;
    try { answer = JSON.parse(line); } catch { left += 1; continue; }
    const step = answer && of.get(`${answer.sample}\n${answer.step}\n${answer.digest}`);
    if (!step || !(typeof answer.reasoning === "string" || answer.reasoning === null)) { left += 1; continue; }
    if (answer.reasoning !== "") area(step).value = answer.reasoning ?? "";
    look(step);
    taken += 1;
  }
  count();
  document.getElementById("count").textContent += `; loaded ${taken} lines, ${left} belong to no step here`;
});
window.addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
count();

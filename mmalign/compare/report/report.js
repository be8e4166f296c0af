"use strict";
(() => {
  document.documentElement.classList.add("js");
  const data = JSON.parse(document.getElementById("data").textContent);
  const gallery = document.getElementById("gallery");
  const toolbar = gallery.querySelector(".toolbar");
  const holder = gallery.querySelector(".cards");
  const cards = [...holder.children];
  const baseline = data.systems.indexOf(data.baseline);
  const state = { reward: 0, order: "prompt", seed: data.seeds.length > 1 ? 0 : "all", category: "", search: "" };

  const minus = (text) => text.replace("-", "\u2212");
  // Binary scores, such as right and wrong, are written in words.
  const write = (value, reward) => data.rewards[reward].words?.[value] ?? minus(value.toFixed(data.rewards[reward].digits));

  // How much better the system is than the baseline on one prompt, over the seeds on view.
  function gain(position, system) {
    const reward = data.rewards[state.reward];
    const columns = state.seed === "all" ? data.seeds.map((_, i) => i) : [state.seed];
    const scores = reward.scores;
    const sum = columns.reduce((all, c) => all + scores[system][position][c] - scores[baseline][position][c], 0);
    return (reward.higher ? 1 : -1) * sum / columns.length;
  }

  function caption(card) {
    const position = Number(card.dataset.position);
    const reward = data.rewards[state.reward];
    for (const row of card.querySelectorAll(".row")) {
      const column = Number(row.dataset.column);
      row.hidden = state.seed !== "all" && state.seed !== column;
      [...row.children].forEach((figure, system) => {
        const value = reward.scores[system][position][column];
        const ahead = (value - reward.scores[baseline][position][column]) * (reward.higher ? 1 : -1);
        const score = figure.querySelector(".score");
        score.textContent = write(value, state.reward);
        const better = reward.words ? value > 0 : !reward.neutral && system !== baseline && ahead > 1e-6;
        const worse = reward.words ? value <= 0 : !reward.neutral && system !== baseline && ahead < -1e-6;
        score.classList.toggle("good", better);
        score.classList.toggle("bad", worse);
      });
    }
  }

  function update() {
    const wanted = state.search.trim().toLowerCase();
    let visible = 0;
    for (const card of cards) {
      const matches = (!state.category || card.dataset.category === state.category)
        && card.querySelector("h3").textContent.toLowerCase().includes(wanted);
      card.hidden = !matches;
      visible += matches;
      caption(card);
    }
    const [kind, name] = state.order.split("\n");
    const place = (card) => Number(card.dataset.position);
    const system = data.systems.indexOf(name);
    const sign = kind === "gain" ? -1 : 1;
    const key = (card) => (kind === "prompt" ? 0 : sign * gain(place(card), system));
    const keyed = cards.map((card) => [key(card), place(card), card]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    holder.append(...keyed.map((entry) => entry[2]));
    holder.classList.toggle("one-seed", state.seed !== "all");
    toolbar.querySelector(".count").textContent = `${visible} of ${cards.length} ${data.item}s`;
    gallery.querySelector(".empty").hidden = visible > 0;
  }

  function press(group, button) {
    for (const one of group.querySelectorAll("button")) one.setAttribute("aria-pressed", String(one === button));
  }

  toolbar.addEventListener("submit", (event) => event.preventDefault());
  toolbar.addEventListener("input", ({ target }) => {
    if (target.name === "reward") state.reward = Number(target.value);
    else if (target.name === "order") {
      const option = target.selectedOptions[0];
      state.order = option.dataset.system ? `${option.value.split(" ")[0]}\n${option.dataset.system}` : "prompt";
    } else state[target.name] = target.value;
    update();
  });
  toolbar.addEventListener("click", ({ target }) => {
    if (!target.dataset.seed) return;
    state.seed = target.dataset.seed === "all" ? "all" : Number(target.dataset.seed);
    press(target.parentElement, target);
    update();
  });

  for (const group of document.querySelectorAll("[data-switch]")) {
    const panels = document.querySelectorAll(`.${group.dataset.switch}`);
    const show = (button) => {
      press(group, button);
      for (const panel of panels) panel.hidden = panel.dataset.panel !== button.dataset.show;
    };
    group.addEventListener("click", ({ target }) => { if (target.dataset.show) show(target); });
    show(group.querySelector("button"));
  }

  // A click on a card shows its images enlarged with the scores of every reward.
  const viewer = document.getElementById("viewer");
  holder.addEventListener("click", ({ target }) => {
    const row = target.closest(".row");
    if (!row) return;
    const card = row.closest(".card");
    const copy = row.cloneNode(true);
    copy.hidden = false;
    const position = Number(card.dataset.position), column = Number(row.dataset.column);
    [...copy.children].forEach((figure, system) => {
      const scores = document.createElement("div");
      scores.className = "scores";
      data.rewards.forEach((reward, index) => {
        const label = document.createElement("span"), value = document.createElement("span");
        label.textContent = reward.label;
        value.textContent = write(reward.scores[system][position][column], index);
        scores.append(label, value);
      });
      figure.querySelector(".score").remove();
      figure.querySelector("figcaption").append(scores);
    });
    const heading = card.querySelector("h3").cloneNode(true);
    if (data.seeds.length > 1) heading.append(`  (seed ${data.seeds[column]})`);
    viewer.querySelector("h3").replaceWith(heading);
    viewer.querySelector(".row").replaceWith(copy);
    viewer.querySelector(".strip")?.remove();
    const strip = card.querySelector(".strip");
    if (strip) viewer.querySelector("h3").after(strip.cloneNode());
    viewer.showModal();
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });

  for (const block of document.querySelectorAll(".copy")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(block.querySelector("code").textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(block.querySelector("code"));
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
    block.append(button);
  }
  update();
})();

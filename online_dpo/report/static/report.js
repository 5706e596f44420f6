// The colour switch and the answer browser. Texts enter the page through `textContent` alone; one prompt is drawn at a time.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);

  // --- colours ---

  at("switch").hidden = false;
  at("scheme").addEventListener("change", (event) => {
    document.documentElement.dataset.scheme = event.target.value;
  });

  // --- answers ---

  const data = JSON.parse(at("data").textContent);
  const INITIAL = 0;
  const arms = [...new Set(data.columns.map((column) => column.arm))];
  const value = (column, key, place) => {
    const values = data.sets[column.set][key];
    return values === undefined ? null : values[place];
  };
  const present = (number) => typeof number === "number";
  const shown = (number) => Number(number.toPrecision(4)).toString();

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const option = (value, text) => {
    const element = make("option", "", text);
    element.value = value;
    return element;
  };

  let order = [];

  const seed = () => Number(at("seed").value);
  const ofSeed = () => data.columns.filter((column) => column.seed === seed());
  const initialOf = (column) =>
    data.columns.find((one) => one.seed === column.seed && one.arm === column.arm && one.round === INITIAL);
  const columns = () => {
    const own = ofSeed();
    const chosen = at("rounds").value;
    const last = (column) => column.round === Math.max(...own.filter((one) => one.arm === column.arm).map((one) => one.round));
    if (chosen === "all") return own;
    if (chosen === "ends") return own.filter((column) => column.round === INITIAL || last(column));
    return own.filter((column) => column.round === Number(chosen));
  };
  const trained = () => {
    const found = columns().filter((column) => column.round !== INITIAL);
    return found.length ? found : columns();
  };

  // How far apart two scales of scores are is only to be said in each one's own standard deviations.
  const scales = new Map();
  const standardised = (column, key, place) => {
    const name = `${column.set} ${key}`;
    if (!scales.has(name)) {
      const values = (data.sets[column.set][key] || []).filter(present);
      const mean = values.reduce((sum, one) => sum + one, 0) / values.length;
      const variance = values.reduce((sum, one) => sum + (one - mean) ** 2, 0) / values.length;
      scales.set(name, [mean, Math.sqrt(variance) || 1]);
    }
    const score = value(column, key, place);
    const [mean, deviation] = scales.get(name);
    return present(score) ? (score - mean) / deviation : null;
  };
  const largest = (numbers) => numbers.filter(present).reduce((most, one) => Math.max(most, one), -Infinity);
  const gap = (one, other) => (present(one) && present(other) ? Math.abs(one - other) : null);
  const orders = {
    file: (place) => -place,
    change: (place) =>
      largest(trained().map((column) => {
        const initial = initialOf(column);
        return initial ? gap(value(column, "reward", place), value(initial, "reward", place)) : null;
      })),
    arms: (place) => {
      return largest([...group(trained()).values()].map((own) => {
        const scores = own.map((column) => value(column, "reward", place)).filter(present);
        return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : null;
      }));
    },
    gold: (place) =>
      largest(trained().map((column) => gap(standardised(column, "reward", place), standardised(column, "gold", place)))),
    longest: (place) => largest(columns().map((column) => value(column, "tokens", place))),
    abstained: (place) =>
      columns().filter((column) => value(column, "abstained", place) || value(column, "gold_abstained", place)).length,
  };
  const group = (own) => {
    const found = new Map();
    for (const column of own) found.set(column.round, [...(found.get(column.round) || []), column]);
    return found;
  };

  const holds = (place, words) =>
    data.prompts[place].turns.some(([, text]) => text.toLowerCase().includes(words)) ||
    data.prompts[place].id.toLowerCase().includes(words) ||
    columns().some((column) => (value(column, "text", place) || "").toLowerCase().includes(words));

  const label = (place) => {
    const prompt = data.prompts[place];
    const last = prompt.turns.length ? prompt.turns[prompt.turns.length - 1][1] : prompt.id;
    const line = last.replace(/\s+/g, " ");
    return `${place + 1}. ${line.length > 80 ? `${line.slice(0, 79)}…` : line}`;
  };

  const list = () => {
    const words = at("search").value.trim().toLowerCase();
    const rank = orders[at("order").value];
    const kept = at("prompt").value;
    const found = data.prompts.map((_, place) => place).filter((place) => !words || holds(place, words));
    const keys = new Map(found.map((place) => [place, rank(place)]));
    order = found.sort((a, b) => (keys.get(b) === keys.get(a) ? a - b : keys.get(b) - keys.get(a)));
    at("prompt").replaceChildren(...order.map((place) => option(String(place), label(place))));
    if (words && order.includes(Number(kept)) && kept !== "") at("prompt").value = kept;
  };

  const step = (by) => {
    const place = order.indexOf(Number(at("prompt").value)) + by;
    if (place < 0 || place >= order.length) return;
    at("prompt").value = String(order[place]);
    draw();
  };

  // --- one prompt ---

  const draw = () => {
    const place = at("prompt").value === "" ? -1 : Number(at("prompt").value);
    const position = order.indexOf(place);
    at("previous").disabled = position <= 0;
    at("next").disabled = position < 0 || position === order.length - 1;
    at("position").textContent = position < 0
      ? "No prompt and no answer holds these words."
      : `Prompt ${position + 1} of ${order.length}`;
    at("shown").replaceChildren(...(position < 0 ? [] : [drawPrompt(place), ...drawRounds(place)]));
  };
  const drawPrompt = (place) => {
    const prompt = data.prompts[place];
    const box = make("section", "");
    box.append(make("h3", "", `Prompt ${prompt.id}`));
    for (const [role, text] of prompt.turns) {
      const turn = make("div", "turn");
      turn.append(make("p", "role", role), make("p", "said", text));
      box.append(turn);
    }
    return box;
  };
  const drawRounds = (place) => {
    const rounds = [...group(columns()).entries()].sort(([a], [b]) => a - b);
    return rounds.map(([round, own]) => {
      const box = make("section", "");
      box.append(make("h3", "", round === INITIAL ? "Before training" : `Round ${round}`));
      const answers = make("div", "answers");
      // Arms that share a policy share its answers: the initial policy is shown once.
      const sets = new Map();
      for (const column of own) sets.set(column.set, [...(sets.get(column.set) || []), column]);
      for (const shared of sets.values()) answers.append(drawAnswer(place, shared, own.length));
      box.append(answers);
      return box;
    });
  };
  const drawAnswer = (place, shared, all) => {
    const [column] = shared;
    const box = make("article", "answer");
    const names = column.round === INITIAL && shared.length === all && all > 1 ? "initial policy" : shared.map((one) => one.arm).join(", ");
    box.append(make("h4", "", names));
    const text = value(column, "text", place);
    if (text === null) {
      box.append(make("p", "empty", "no answer to this prompt"));
      return box;
    }
    box.append(scores(column, place));
    for (const [key, name] of [["abstained", "judge"], ["gold_abstained", "gold judge"]]) {
      const reason = value(column, key, place);
      if (reason) box.append(make("p", "abstained", `The ${name} abstained: ${reason}`));
    }
    box.append(text === "" ? make("p", "empty", "an empty answer") : make("p", "said", text));
    return box;
  };
  const scores = (column, place) => {
    const line = make("p", "scores");
    const initial = column.round === INITIAL ? null : initialOf(column);
    for (const [key, name] of [["reward", "reward"], ["gold", "gold"]]) {
      const score = value(column, key, place);
      if (!present(score)) continue;
      line.append(`${name} ${shown(score)}`);
      const before = initial ? value(initial, key, place) : null;
      if (present(before)) {
        const change = score - before;
        const word = change > 0 ? "better" : change < 0 ? "worse" : "equal";
        const sign = change > 0 ? "+" : "";
        line.append(" ", make("span", word, word === "equal" ? "(as before)" : `(${word}, ${sign}${shown(change)})`));
      }
      line.append(" · ");
    }
    const ended = value(column, "ended", place);
    line.append(`${value(column, "tokens", place)} tokens${ended ? "" : ", cut off"}`);
    return line;
  };

  // --- start ---

  const refill = () => {
    list();
    draw();
  };
  const fillRounds = () => {
    const kept = at("rounds").value;
    const numbers = [...new Set(ofSeed().map((column) => column.round))].sort((a, b) => a - b);
    at("rounds").replaceChildren(
      option("ends", "before training and last"),
      option("all", "all"),
      ...numbers.map((number) => option(String(number), number === INITIAL ? "before training" : `round ${number}`)),
    );
    if (kept && [...at("rounds").options].some((one) => one.value === kept)) at("rounds").value = kept;
  };
  const start = () => {
    at("browser").hidden = false;
    const seeds = [...new Set(data.columns.map((column) => column.seed))].sort((a, b) => a - b);
    at("seed").replaceChildren(...seeds.map((number) => option(String(number), String(number))));
    fillRounds();
    const has = (key) => data.sets.some((own) => own[key] !== undefined);
    const absent = { arms: arms.length < 2, gold: !has("gold"), abstained: !has("abstained") && !has("gold_abstained") };
    for (const [key, missing] of Object.entries(absent)) {
      if (missing) at("order").querySelector(`option[value="${key}"]`).remove();
    }
    for (const id of ["order", "rounds"]) at(id).addEventListener("change", refill);
    at("seed").addEventListener("change", () => {
      fillRounds();
      refill();
    });
    at("search").addEventListener("input", refill);
    at("prompt").addEventListener("change", draw);
    at("previous").addEventListener("click", () => step(-1));
    at("next").addEventListener("click", () => step(1));
    at("browser").addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
      if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "ArrowRight") step(1);
      else return;
      event.preventDefault();
    });
    refill();
  };
  if (data.prompts.length && data.columns.length) start();
})();

// The page of the service: streams an answer, and draws what /v1/info says of the ranks. No library, no global names.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  let token = null; // kept here only: gone with the page
  let model = null;
  let working = null; // the AbortController of the answer under way

  const headers = (more = {}) => (token ? { ...more, Authorization: `Bearer ${token}` } : more);

  // ---- the answer

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue; // a comment: the server still works
        if (part === "data: [DONE]") return;
        yield JSON.parse(part.slice(6));
      }
    }
  }

  async function refusal(response) {
    try {
      return (await response.json()).error.message;
    } catch {
      return `${response.status} ${response.statusText}`;
    }
  }

  function asked() {
    const chat = $("kind").value === "chat";
    const body = {
      model, stream: true, stream_options: { include_usage: true },
      max_tokens: Number($("most").value), temperature: Number($("heat").value),
    };
    if (chat) body.messages = [{ role: "user", content: $("prompt").value }];
    else body.prompt = $("prompt").value;
    return [chat ? "v1/chat/completions" : "v1/completions", body];
  }

  async function send(event) {
    event.preventDefault();
    if (working) return;
    working = new AbortController();
    show(true);
    $("answer").className = "";
    $("answer").textContent = "";
    $("figures").textContent = "\u00a0";
    const began = performance.now();
    let first = null;
    let usage = null;
    let finish = "stopped";
    try {
      const [path, body] = asked();
      const response = await fetch(path, {
        method: "POST", body: JSON.stringify(body), signal: working.signal,
        headers: headers({ "Content-Type": "application/json" }),
      });
      if (response.status === 401) lock();
      if (!response.ok) throw new Error(await refusal(response));
      for await (const part of events(response)) {
        if (part.error) throw new Error(part.error.message);
        usage = part.usage || usage;
        const choice = part.choices[0];
        if (!choice) continue;
        const text = choice.text ?? choice.delta.content ?? "";
        if (text && first === null) first = performance.now();
        if (text) $("answer").append(text);
        finish = choice.finish_reason || finish;
      }
      figures(began, first, usage, finish);
    } catch (error) {
      if (error.name === "AbortError") figures(began, first, usage, finish);
      else fail(error.message);
    } finally {
      working = null;
      show(false);
      look();
    }
  }

  function figures(began, first, usage, finish) {
    const parts = [];
    if (first !== null) parts.push(`first token ${(first - began).toFixed(0)} ms`);
    if (usage) {
      const seconds = (performance.now() - first) / 1000;
      parts.push(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`);
      if (usage.completion_tokens > 1 && seconds > 0) {
        parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
      }
      const cached = usage.prompt_tokens_details.cached_tokens;
      if (cached) parts.push(`${cached} cached`);
    }
    parts.push({ stop: "complete", length: "length reached" }[finish] || finish);
    $("figures").textContent = parts.join("  ·  ");
  }

  function fail(message) {
    $("answer").className = "error";
    $("answer").textContent = message;
  }

  function show(busy) {
    $("ask").classList.toggle("busy", busy);
    $("send").disabled = busy || model === null;
    $("stop").disabled = !busy;
  }

  // ---- the ranks

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function drawRanks(ranks) {
    if (!ranks.length) {
      $("ranks").replaceChildren(element("p", "No rank answers.", "empty"));
      return;
    }
    $("ranks").replaceChildren(...ranks.flatMap((rank) => {
      const bar = element("div", undefined, "bar");
      const fill = element("i");
      const share = rank.cache_pages ? rank.cache_pages_used / rank.cache_pages : 0;
      fill.hidden = share === 0;
      fill.style.width = `${(100 * share).toFixed(1)}%`;
      bar.append(fill);
      bar.title = `${(100 * share).toFixed(1)}% of the cache is in use`;
      const pages = rank.cache_pages ? `${rank.cache_pages_used} of ${rank.cache_pages} pages` : "no cache";
      return [
        element("span", `rank ${rank.rank}`),
        element("span", `${rank.device}, ${rank.host}`, "soft where"),
        bar,
        rank.alive ? element("span", `${pages}, ${rank.state}`, "soft") : element("span", rank.state, "dead"),
      ];
    }));
  }

  // A prefill: {tokens, ranks: [{rank, hops: [{source, start_s, stop_s}]}]}, seconds from its beginning.
  function drawHops(prefill) {
    if (!prefill || !prefill.ranks || !prefill.ranks.length) return;
    const [left, lane, gap, width] = [52, 20, 8, 760];
    const end = Math.max(1e-9, ...prefill.ranks.flatMap((rank) => rank.hops.map((hop) => hop.stop_s)));
    const height = prefill.ranks.length * (lane + gap) + 20;
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.append(drawn("title", {}, `Hops of ${prefill.tokens} tokens on ${prefill.ranks.length} ranks`));
    const x = (seconds) => left + ((width - left - 8) * seconds) / end;
    prefill.ranks.forEach((rank, row) => {
      const y = row * (lane + gap);
      svg.append(drawn("text", { x: 0, y: y + 14 }, `rank ${rank.rank}`));
      svg.append(drawn("rect", { class: "lane", x: left, y, width: width - left - 8, height: lane, rx: 3 }));
      for (const hop of rank.hops) {
        const box = drawn("rect", { x: x(hop.start_s), y, height: lane, rx: 2, class: "hop",
          width: Math.max(1, x(hop.stop_s) - x(hop.start_s) - 0.5) });
        box.style.fill = `var(--hop-${hop.source % 8})`;
        const ms = 1e3 * (hop.stop_s - hop.start_s);
        box.append(drawn("title", {}, `keys of rank ${hop.source}: ${ms.toFixed(2)} ms`));
        svg.append(box);
      }
    });
    svg.append(drawn("text", { x: left, y: height - 4 }, "0"));
    svg.append(drawn("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, `${(1e3 * end).toFixed(1)} ms`));
    const legend = element("p", `${prefill.tokens} tokens; a colour is the rank whose keys are attended to`, "figures");
    $("hops").replaceChildren(svg, legend);
  }

  function drawn(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function badge(text, kind) {
    $("state").textContent = text;
    $("state").className = `badge ${kind}`;
  }

  async function look() {
    let response;
    try {
      response = await fetch("v1/info", { headers: headers() });
    } catch {
      badge("no connection", "bad");
      return;
    }
    if (response.status === 401) return lock();
    if (!response.ok) return badge(await refusal(response), "bad");
    const info = await response.json();
    $("lock").hidden = true;
    model = info.model;
    const context = info.context_tokens ? `, ${info.context_tokens} tokens` : "";
    $("model").textContent = model ? `${model}${context}` : "attention only, no model";
    $("version").textContent = `ringfa3 ${info.version}` + (info.restarts ? `, ${info.restarts} restarts` : "");
    badge(info.ready ? "ready" : "not ready", info.ready ? "good" : "bad");
    $("ask").hidden = model === null;
    show(working !== null);
    drawRanks(info.ranks);
    drawHops(info.gang.last_prefill);
  }

  function lock() {
    token = null;
    badge("locked", "");
    $("lock").hidden = false;
  }

  $("lock").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value;
    $("token").value = "";
    look();
  });
  $("ask").addEventListener("submit", send);
  $("stop").addEventListener("click", () => working && working.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  show(false);
  look();
  setInterval(() => { if (!document.hidden && $("lock").hidden) look(); }, 2000);
})();

// Filters, search, order, paging and the zoom. Without this script the page shows every result, in the report's order.
(() => {
  const pick = id => document.getElementById(id);
  const cards = pick("cards");
  if (!cards) return;
  const PER_PAGE = 24; // images
  const OUTCOMES = {
    good: "edit done, rest kept", "nothing-changed": "nothing changed", faint: "edit faint", "off-target": "off target",
    drifted: "rest drifted or changed", rejected: "rejected by gates", failed: "failed",
  };
  const plain = text => text.toLowerCase().normalize("NFKC");
  const known = text => text === undefined || text === "" ? null : Number(text);

  // One record per result. Those of the report's other pages come from its index, where there is one, without elements.
  const groups = [...cards.children].map(element => {
    const text = plain([...element.querySelectorAll(".id, .caption")].map(one => one.textContent).join(" "));
    const group = { element, id: element.querySelector(".id").textContent };
    group.tiles = [...element.querySelectorAll(".tile")].map(tile => {
      const data = tile.dataset, concepts = JSON.parse(data.concepts), target = tile.querySelector(".target")?.textContent;
      return {
        element: tile, group, edit: data.edit, method: data.method, concept: concepts, outcome: data.outcomes.split(" "),
        score: known(data.score), change: known(data.change), rest: known(data.rest), gain: known(data.gain),
        text: plain([text, ...concepts, target || "", data.prompts || ""].join(" ")),
      };
    });
    return group;
  });
  const here = groups.flatMap(group => group.tiles);
  const page = Number(document.querySelector(".parts b")?.textContent || 1);
  const elsewhere = (window.shardeditIndex || []).filter(entry => entry[0] !== page).map(([at, edit, method, outcome, concept, text]) =>
    ({ page: at, edit, method, outcome: outcome.split(" "), concept, text: plain(text) }));

  // Each facet counts what it would show beside the other facets' choices.
  const facets = ["edit", "method", "concept", "outcome"];
  const has = (tile, facet, value) => !value || (Array.isArray(tile[facet]) ? tile[facet].includes(value) : tile[facet] === value);
  const chosen = () => Object.fromEntries([...facets.map(facet => [facet, pick(facet).value]), ["q", pick("find").value.trim()]]);
  const matches = (tile, want, except) =>
    facets.every(facet => facet === except || has(tile, facet, want[facet])) &&
    plain(want.q).split(/\s+/).every(word => tile.text.includes(word));

  function options(facet) {
    const counts = new Map();
    for (const tile of here) for (const value of [tile[facet]].flat()) if (value) counts.set(value, (counts.get(value) || 0) + 1);
    const order = facet === "outcome" ? Object.keys(OUTCOMES).filter(name => counts.has(name))
      : [...counts.keys()].sort((a, b) => facet === "concept" ? counts.get(b) - counts.get(a) || (a < b ? -1 : 1) : a < b ? -1 : 1);
    pick(facet).replaceChildren(...["", ...order.slice(0, 200)].map(value => {
      const option = document.createElement("option");
      option.value = value;
      return option;
    }));
    // Nothing to choose: nothing to show.
    pick(facet).parentElement.hidden = facet !== "outcome" && order.length < 2;
  }

  function recount(want) {
    for (const facet of facets) {
      const rest = here.filter(tile => matches(tile, want, facet));
      for (const option of pick(facet).options) {
        const count = rest.filter(tile => has(tile, facet, option.value)).length;
        option.textContent = `${option.value ? OUTCOMES[option.value] || option.value : "all"} (${count})`;
      }
    }
  }

  // An image stands where its worst (or best) visible result puts it; what has no figure comes last.
  const orders = {
    worst: ["score", 1], best: ["score", -1], edit: ["change", 1], rest: ["rest", -1], gain: ["gain", 1],
  };
  function sorted(visible, order) {
    if (order === "id") return [...visible].sort((a, b) => a.id < b.id ? -1 : a.id > b.id ? 1 : 0);
    const [figure, sign] = orders[order], keys = new Map();
    for (const group of visible) {
      const values = group.tiles.filter(tile => !tile.element.hidden && tile[figure] !== null).map(tile => sign * tile[figure]);
      keys.set(group, [values.length ? Math.min(...values) : Infinity, values.reduce((sum, value) => sum + value, 0) / (values.length || 1)]);
    }
    const compare = (a, b) => a === b ? 0 : a < b ? -1 : 1;
    return [...visible].sort((a, b) =>
      compare(keys.get(a)[0], keys.get(b)[0]) || compare(keys.get(a)[1], keys.get(b)[1]) || compare(a.id, b.id));
  }

  let at = 0, shown = [];
  function update(keepPlace) {
    const want = chosen();
    let count = 0;
    for (const tile of here) {
      tile.element.hidden = !matches(tile, want);
      count += !tile.element.hidden;
    }
    shown = sorted(groups.filter(group => group.tiles.some(tile => !tile.element.hidden)), pick("order").value);
    if (!keepPlace) at = 0;
    recount(want);
    const filtered = facets.some(facet => want[facet]) || want.q;
    pick("shown").textContent = `${count} of ${here.length} results, ${shown.length} of ${groups.length} images`;
    pick("reset").hidden = !filtered;
    pick("nothing").hidden = count > 0;
    remember(want);
    turn();
    tellElsewhere(want, filtered);
  }

  function turn() {
    const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    at = Math.min(Math.max(at, 0), pages - 1);
    const visible = new Set(shown.slice(at * PER_PAGE, (at + 1) * PER_PAGE));
    for (const group of groups) {
      group.element.hidden = !visible.has(group);
      group.element.style.setProperty("--n", Math.min(1 + group.tiles.filter(tile => !tile.element.hidden).length, 6));
    }
    cards.append(...[...visible].map(group => group.element));
    pick("pager").hidden = pages === 1;
    pick("place").textContent = `images ${at * PER_PAGE + 1} to ${at * PER_PAGE + visible.size} of ${shown.length}`;
    pick("back").disabled = at === 0;
    pick("next").disabled = at === pages - 1;
  }

  function tellElsewhere(want, filtered) {
    const counts = new Map();
    if (filtered) for (const tile of elsewhere) if (matches(tile, want)) counts.set(tile.page, (counts.get(tile.page) || 0) + 1);
    const links = [...counts].map(([number, count]) => {
      const link = document.createElement("a"), name = `page-${String(number).padStart(4, "0")}.html`;
      link.href = (number === 1 ? (page === 1 ? "" : "../report.html") : (page === 1 ? "report/" : "") + name) + location.hash;
      link.textContent = `page ${number} (${count})`;
      return link;
    });
    pick("elsewhere").hidden = !links.length;
    pick("elsewhere").replaceChildren("Also matching: ", ...links);
  }

  // The choice stands in the address, so that a link or a reload brings it back.
  function remember(want) {
    const kept = Object.entries({ ...want, order: pick("order").value === "worst" ? "" : pick("order").value }).filter(([, value]) => value);
    const hash = new URLSearchParams(kept).toString();
    if (hash || location.hash) try { history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search); } catch { /* some viewers forbid it */ }
  }
  function recall() {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
      if (name === "q") pick("find").value = value;
      else if ([...facets, "order"].includes(name) && [...pick(name).options].some(option => option.value === value)) pick(name).value = value;
  }

  // Zoom: the input under the edit, a slider between them, the mask above.
  const zoom = pick("zoom"), stage = pick("stage"), slide = pick("slide");
  let looking = null;
  const visibleTiles = () => shown.flatMap(group => group.tiles).filter(tile => !tile.element.hidden && tile.element.querySelector(".pic"));
  function look(tile) {
    looking = tile;
    const own = tile.element, input = tile.group.element.querySelector(".input .pic"), mask = own.querySelector(".mask");
    const fill = (name, from) => {
      const img = stage.querySelector(name);
      img.hidden = !from;
      if (from) { img.src = from.src; img.alt = from.alt; } else img.removeAttribute("src");
    };
    fill(".before", input);
    fill(".after", own.querySelector(".pic"));
    fill(".mask", mask);
    pick("overlay").hidden = !mask;
    showMask();
    stage.style.setProperty("--ratio", tile.group.element.style.getPropertyValue("--ratio"));
    pick("zoomed").replaceChildren(...[...tile.group.element.querySelector(".id").childNodes].map(node => node.cloneNode()));
    const told = own.querySelector(".said").cloneNode(true);
    told.querySelectorAll("details").forEach(details => { details.open = true; });
    const caption = tile.group.element.querySelector(".caption");
    pick("told").replaceChildren(...(caption ? [caption.cloneNode(true)] : []), told);
    const all = visibleTiles(), place = all.indexOf(tile);
    pick("before").disabled = place <= 0;
    pick("after").disabled = place === all.length - 1;
    split(50);
    if (!zoom.open) zoom.showModal();
  }
  const showMask = () => { stage.querySelector(".mask").hidden = !pick("overlay").querySelector("input").checked || pick("overlay").hidden; };
  const split = percent => { slide.value = percent; stage.style.setProperty("--at", `${percent}%`); };
  function step(by) {
    const all = visibleTiles(), next = all[all.indexOf(looking) + by];
    if (next) look(next);
  }
  function dragged(event) {
    const box = stage.getBoundingClientRect();
    split(Math.min(100, Math.max(0, 100 * (event.clientX - box.left) / box.width)));
  }
  stage.addEventListener("pointerdown", event => { stage.setPointerCapture(event.pointerId); dragged(event); });
  stage.addEventListener("pointermove", event => event.buttons && dragged(event));
  slide.addEventListener("input", () => split(slide.value));
  pick("overlay").addEventListener("change", showMask);
  pick("before").addEventListener("click", () => step(-1));
  pick("after").addEventListener("click", () => step(1));
  pick("close").addEventListener("click", () => zoom.close());
  zoom.addEventListener("click", event => event.target === zoom && zoom.close());
  zoom.addEventListener("close", () => {
    const place = shown.indexOf(looking.group);
    if (place >= 0 && Math.floor(place / PER_PAGE) !== at) { at = Math.floor(place / PER_PAGE); turn(); }
    looking.element.querySelector(".shot").focus();
  });
  for (const tile of here) {
    const shot = tile.element.querySelector(".shot"), pic = shot.querySelector(".pic");
    if (!pic) continue;
    shot.tabIndex = 0;
    shot.setAttribute("role", "button");
    shot.setAttribute("aria-label", `zoom, ${pic.alt}, ${shot.textContent}`);
    shot.addEventListener("click", () => look(tile));
    shot.addEventListener("keydown", event => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), look(tile)));
  }
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest?.("input, select, textarea");
    if (zoom.open && !typing && event.key === "ArrowLeft") step(-1);
    else if (zoom.open && !typing && event.key === "ArrowRight") step(1);
    else if (!zoom.open && !typing && event.key === "/") { event.preventDefault(); pick("find").focus(); }
  });

  facets.forEach(options);
  recall();
  for (const id of [...facets, "order"]) pick(id).addEventListener("change", () => update());
  pick("find").addEventListener("input", () => update());
  pick("reset").addEventListener("click", () => { for (const id of [...facets, "find"]) pick(id).value = ""; update(); });
  pick("masks").addEventListener("change", event => cards.classList.toggle("masks", event.target.checked));
  for (const [id, by] of [["back", -1], ["next", 1]]) pick(id).addEventListener("click", () => { at += by; turn(); pick("results").scrollIntoView(); });
  pick("tools").hidden = pick("state").hidden = false;
  update();
})();

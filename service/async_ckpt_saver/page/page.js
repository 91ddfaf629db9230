"use strict";
// Shows what /events sends, which is /status.json again and again. Text goes in as text, never as HTML.

const PHASES = ["stall", "copy", "write", "commit"];

function element(name, classes, ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 120) return `${value.toFixed(1)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

function size(bytes) {
  if (!bytes) return "–";
  const unit = Math.min(Math.floor(Math.log10(bytes) / 3), 4);
  return `${(bytes / 1000 ** unit).toFixed(unit ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

function fact(name, value) {
  return element("li", "", `${name} `, element("b", "", String(value)));
}

// Seconds of each phase; of what ranks do side by side, the slowest one's.
function phases(save) {
  const slowest = (name) => save.staged.reduce((longest, rank) => Math.max(longest, rank[name]), 0);
  return { stall: slowest("stall_s"), copy: slowest("copy_s"), write: save.write_s, commit: save.commit_s };
}

function total(save) {
  return Object.values(phases(save)).reduce((sum, lasted_s) => sum + lasted_s, 0);
}

// The second tier of a run's directory, or undefined; its uploads by step.
function second(run, status) {
  return status.uploads.find((each) => each.directory === run.directory);
}

function uploadOf(save, tier) {
  return tier && tier.uploads.find((each) => each.step === save.step && each.outcome !== "dropped");
}

function bar(save, upload, longest_s) {
  const made = element("div", "timeline");
  for (const [phase, lasted_s] of Object.entries({ ...phases(save), upload: upload ? upload.upload_s : 0 })) {
    if (!lasted_s) continue;
    const part = element("i", phase);
    part.style.width = `${(100 * lasted_s) / longest_s}%`;
    part.title = `${phase} ${seconds(lasted_s)}`;
    made.append(part);
  }
  return made;
}

function uploadText(save, tier) {
  if (tier.uploading === save.step) return "now";
  if (tier.queued.includes(save.step)) return "waits";
  const upload = tier.uploads.find((each) => each.step === save.step);
  if (!upload) return "–";
  return upload.outcome === "uploaded" ? seconds(upload.upload_s) : upload.outcome;
}

function row(save, tier, longest_s) {
  const lasted_s = phases(save);
  const wide = PHASES.map((phase) => element("td", "wide", seconds(lasted_s[phase])));
  if (tier) wide.push(element("td", "wide", save.outcome === "committed" ? uploadText(save, tier) : "–"));
  if (save.outcome !== "committed" && save.outcome !== "open") {
    const why = element("td", "bad", `${save.outcome}: ${save.reason}`);
    why.colSpan = tier ? 8 : 7;
    return element("tr", "", element("td", "", String(save.step)), why);
  }
  return element("tr", "", element("td", "", String(save.step)), element("td", "bar", bar(save, uploadOf(save, tier), longest_s)), ...wide,
    element("td", "", size(save.bytes)), element("td", "", save.outcome === "open" ? "…" : seconds(total(save))));
}

function saves(run, tier) {
  if (!run.saves.length) return element("p", "", "no save yet");
  const uploading_s = (save) => (uploadOf(save, tier) ? uploadOf(save, tier).upload_s : 0);
  const longest_s = Math.max(...run.saves.map((save) => total(save) + uploading_s(save)), 1e-9);
  const names = [["step", ""], ["", ""], ["stall", "wide"], ["copy", "wide"], ["write", "wide"], ["commit", "wide"],
    ...(tier ? [["upload", "wide"]] : []), ["size", ""], ["sum", ""]];
  const head = element("tr", "", ...names.map(([name, classes]) => element("th", classes, name)));
  const newest_first = [...run.saves].reverse();
  return element("table", "", element("thead", "", head), element("tbody", "", ...newest_first.map((save) => row(save, tier, longest_s))));
}

function section(run, status) {
  const tier = second(run, status);
  const ranks = run.ranks.map((rank) => {
    const made = element("li", rank.alive ? "" : "gone", String(rank.rank));
    made.title = `rank ${rank.rank}, pid ${rank.pid}${rank.alive ? "" : ", gone"}`;
    return made;
  });
  const facts = [fact("state", run.state), fact("ranks", run.world), fact("in shared memory", size(run.image_bytes))];
  if (run.last_commit_step !== null) facts.push(fact("newest", `step ${run.last_commit_step}, ${seconds(run.last_commit_age_s)} ago`));
  if (tier) {
    facts.push(fact("second tier", tier.url));
    facts.push(fact("uploaded", tier.last_upload_step === null ? "nothing yet" : `step ${tier.last_upload_step}, ${seconds(tier.last_upload_age_s)} ago`));
    if (tier.queued.length) facts.push(fact("waiting", tier.queued.length));
    if (tier.last_error) facts.push(fact("last upload error", tier.last_error));
  }
  return element("section", "", element("h2", "", run.directory), element("ul", "facts", ...facts),
    element("ul", "ranks", ...ranks), saves(run, tier));
}

function hosts(status) {
  if (!status.hosts.length) return [];
  const copy = (host) => (host.copy_step === null ? "" : `, keeps a copy of step ${host.copy_step} in RAM`);
  const lines = status.hosts.map((host) =>
    fact(host.name, `${host.ranks} ranks, ${size(host.relayed_bytes)} handed over, heard ${seconds(host.silent_s)} ago${copy(host)}`));
  return [element("section", "", element("h2", "", "hosts that relay to this saver"), element("ul", "facts", ...lines))];
}

function show(status) {
  document.getElementById("saver").textContent =
    `${status.version}, pid ${status.pid}, up ${seconds(status.uptime_s)}, ${size(status.rss_bytes)} resident, ${status.endpoint}, root ${status.root}`;
  const all = [...status.runs, ...[...status.ended].reverse()];
  const runs = all.length ? all.map((run) => section(run, status)) : [element("section", "", "no run has attached yet")];
  document.getElementById("runs").replaceChildren(...hosts(status), ...runs);
}

function say(text, bad) {
  const line = document.getElementById("connection");
  line.textContent = text;
  line.className = bad ? "bad" : "";
}

const events = new EventSource("/events");
events.onmessage = (event) => { say("live", false); show(JSON.parse(event.data)); };
events.onerror = () => say("the saver does not answer; what is shown is old", true);

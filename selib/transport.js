// Play, pause and a slider through the frames of a clip; the sound, where there is one, is the clock.

function render({ model, el }) {
  const button = document.createElement("button"), slider = document.createElement("input");
  const place = document.createElement("span"), audio = document.createElement("audio");
  el.className = "selib-transport";
  button.type = "button";
  button.className = "jupyter-button";
  slider.type = "range";
  slider.setAttribute("aria-label", "frame");
  el.append(button, slider, place, audio);
  let playing = false, started = 0;

  const seconds = () => model.get("value") / model.get("fps");
  const sounding = () => model.get("sound").byteLength > 0;
  function go(frame) {
    model.set("value", Math.max(0, Math.min(frame, model.get("max"))));
    model.save_changes();
  }
  function show() {
    slider.max = model.get("max");
    slider.value = model.get("value");
    place.textContent = `frame ${model.get("value")} of ${model.get("max") + 1}, ${seconds().toFixed(2)} s`;
    button.textContent = playing ? "⏸ pause" : "▶ play";
  }
  function seek() {
    started = performance.now() - 1000 * seconds();
    if (sounding()) audio.currentTime = seconds();
  }
  function stop() {
    playing = false;
    audio.pause();
    show();
  }
  function tick() {
    if (!playing || !el.isConnected) return stop();
    const now = sounding() ? audio.currentTime : (performance.now() - started) / 1000;
    const frame = Math.floor(now * model.get("fps"));
    if (frame > model.get("max") || audio.ended) {
      go(model.get("max"));
      return stop();
    }
    if (frame !== model.get("value")) go(frame);
    requestAnimationFrame(tick);
  }
  button.addEventListener("click", async () => {
    if (playing) return stop();
    if (model.get("value") >= model.get("max")) go(0);
    seek();
    playing = true;
    show();
    if (sounding()) await audio.play().catch(() => undefined);
    tick();
  });
  slider.addEventListener("input", () => {
    go(Number(slider.value));
    seek();
  });
  function load() {
    if (audio.src) URL.revokeObjectURL(audio.src);
    audio.src = sounding() ? URL.createObjectURL(new Blob([model.get("sound")], { type: "audio/wav" })) : "";
    stop();
  }
  model.on("change:sound", load);
  model.on("change:value change:max change:fps", show);
  load();
  return () => audio.pause();
}

export default { render };

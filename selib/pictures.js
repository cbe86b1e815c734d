// A row of pictures that says where the pointer is; selib/pictures.py has the other half.
// Python answers each message by counting `heard` up; until then only the last move is kept.

function render({ model, el }) {
  const row = document.createElement("div");
  const tip = document.createElement("div");
  row.className = `selib-pictures selib-${model.get("kind")}`;
  tip.className = "selib-tip";
  el.append(row, tip);
  let waiting = false, latest = null, held = false;

  function send(message) {
    waiting = true;
    latest = null;
    model.send(message);
  }
  function tell(kind, index, image, event) {
    const box = image.getBoundingClientRect();
    const inside = event.clientX !== undefined && event.detail !== 0;  // a key has no place
    const x = inside ? (event.clientX - box.left) / box.width : 0.5;
    const y = inside ? (event.clientY - box.top) / box.height : 0.5;
    const message = { kind, index, x, y };
    if (waiting && (kind === "move" || kind === "drag")) latest = message;
    else send(message);
  }
  function place(event) {
    const box = el.getBoundingClientRect();
    const left = event.clientX - box.left;
    tip.style.left = left < box.width / 2 ? `${left + 14}px` : "";
    tip.style.right = left < box.width / 2 ? "" : `${box.width - left + 14}px`;
    tip.style.top = `${event.clientY - box.top + 14}px`;
  }

  function listen(image, index) {
    image.addEventListener("pointermove", (event) => {
      place(event);
      tell(held ? "drag" : "move", index, image, event);
    });
    image.addEventListener("pointerleave", () => {
      latest = null;
      tip.classList.remove("selib-on");
    });
    if (index !== model.get("draggable")) {
      image.parentElement.addEventListener("click", (event) => tell("click", index, image, event));
      return;
    }
    image.classList.add("selib-drag");
    image.addEventListener("pointerdown", (event) => {
      held = true;
      image.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    image.addEventListener("pointerup", (event) => {
      if (held) tell("drop", index, image, event);
      held = false;
    });
    image.addEventListener("pointercancel", () => (held = false));
  }

  function frame(index) {
    const button = document.createElement(model.get("clickable") ? "button" : "div");
    const label = document.createElement("span"), image = document.createElement("img");
    if (button.type) button.type = "button";
    image.draggable = false;
    button.append(label, image);
    row.append(button);
    listen(image, index);
    return button;
  }
  function draw() {
    const images = model.get("images");
    while (row.children.length > images.length) row.lastChild.remove();
    images.forEach((bytes, index) => {
      const button = row.children[index] ?? frame(index);
      const image = button.querySelector("img"), before = image.src;
      image.onload = () => {
        if (before) URL.revokeObjectURL(before);
        const width = image.naturalWidth * model.get("scale");
        button.style.flexBasis = image.style.maxWidth = `${width}px`;
      };
      image.src = URL.createObjectURL(new Blob([bytes]));
    });
    describe();
  }
  function describe() {
    const labels = model.get("labels"), marks = model.get("marks"), said = model.get("said");
    [...row.children].forEach((button, index) => {
      button.querySelector("span").textContent = labels[index] ?? "";
      button.querySelector("img").alt = said[index] ?? labels[index] ?? "";
      button.title = model.get("clickable") ? said[index] ?? "" : "";
      if (model.get("clickable")) button.setAttribute("aria-pressed", Boolean(marks[index]));
      if (marks[index] && model.get("kind") === "thumbnails")
        row.scrollLeft = button.offsetLeft - row.clientWidth / 2;
    });
  }
  function show() {
    const { text, image } = model.get("tip");
    const old = tip.querySelector("img");
    if (old) URL.revokeObjectURL(old.src);
    tip.replaceChildren(text ?? "");
    if (image) {
      const picture = document.createElement("img");
      picture.src = URL.createObjectURL(new Blob([image]));
      tip.append(picture);
    }
    tip.classList.toggle("selib-on", Boolean(text) && row.matches(":hover"));
  }

  model.on("change:images", draw);
  model.on("change:labels change:marks change:said", describe);
  model.on("change:tip", show);
  model.on("change:heard", () => {
    waiting = false;
    if (latest) send(latest);
  });
  draw();
}

export default { render };

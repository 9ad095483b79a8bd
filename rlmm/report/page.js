"use strict";
(() => {
  const root = document.documentElement;

  // Tabs: the panels are plain sections in the page; without this script they simply follow each other.
  document.querySelectorAll("[data-tabs]").forEach((group) => {
    const panels = [...group.querySelectorAll(":scope > [data-tab]")];
    if (panels.length < 2) return;
    const list = document.createElement("div");
    list.className = "tablist";
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", group.dataset.tabs);
    const buttons = panels.map((panel, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = panel.dataset.tab;
      button.setAttribute("role", "tab");
      button.setAttribute("aria-controls", panel.id);
      button.addEventListener("click", () => show(index));
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-label", panel.dataset.tab);
      list.append(button);
      return button;
    });
    const show = (chosen) => {
      buttons.forEach((button, index) => {
        button.setAttribute("aria-selected", String(index === chosen));
        button.tabIndex = index === chosen ? 0 : -1;
        panels[index].hidden = index !== chosen;
      });
    };
    list.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = (buttons.indexOf(document.activeElement) + move + buttons.length) % buttons.length;
      show(next);
      buttons[next].focus();
    });
    group.classList.add("tabbed");
    group.prepend(list);
    show(0);
  });

  // A click on an image shows it large; Escape or another click closes it.
  const dialog = document.getElementById("lightbox");
  dialog.addEventListener("click", () => dialog.close());
  document.querySelectorAll("button.zoom").forEach((button) => {
    button.addEventListener("click", () => {
      const image = button.querySelector("img").cloneNode();
      const caption = document.createElement("p");
      caption.textContent = image.alt;
      dialog.replaceChildren(image, caption);
      dialog.showModal();
    });
  });

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("scheme");
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });

  window.addEventListener("load", () => {
    const images = [...document.images];
    root.dataset.images = String(images.length);
    root.dataset.brokenImages = String(images.filter((image) => image.naturalWidth === 0).length);
    root.dataset.overflow = String(root.scrollWidth - root.clientWidth);
    root.dataset.ready = "true";
  });
})();

/* Grebe mail: the folder tree. Licence: MPL-2.0, see LICENCE.txt */

"use strict";

const FLAG_INBOX = 1 << 0;
const FLAG_SENT = 1 << 1;
const FLAG_TRASH = 1 << 2;
const FLAG_NOSELECT = 1 << 3;

const SORT_RANK = new Map([
  [FLAG_INBOX, 0],
  [FLAG_SENT, 2],
  [FLAG_TRASH, 3],
]);

/**
 * The tree of folders at the left of the main window.
 *
 * Rows are created lazily: the children of a closed folder don't exist in the
 * DOM until the folder is first opened. An archive with a folder for every
 * month since 1998 is more common than one would think.
 *
 * @implements {FolderListener}
 */
class FolderPane {
  /**
   * @param {HTMLElement} list - An empty element of role "tree".
   * @param {AccountManager} accounts
   * @param {Storage} state - Where open folders are remembered.
   */
  constructor(list, accounts, state) {
    this.list = list;
    this.accounts = accounts;
    this.state = state;
    this.rows = new Map();
    this.collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

    list.addEventListener("click", this);
    list.addEventListener("keydown", this);
    list.addEventListener("dragover", this);
    list.addEventListener("drop", this);
    accounts.addFolderListener(this);

    for (const account of accounts.all) {
      list.appendChild(this._createRow(account.rootFolder, 1));
    }
  }

  handleEvent(event) {
    const row = event.target.closest("[role=treeitem]");
    if (!row) {
      return;
    }
    switch (event.type) {
      case "click":
        if (event.target.classList.contains("twisty")) {
          this.toggle(row);
        } else {
          this.select(row);
        }
        break;
      case "keydown":
        this._onKey(event, row);
        break;
      case "dragover":
        if (this._canDrop(event.dataTransfer, row)) {
          event.dataTransfer.dropEffect = event.ctrlKey ? "copy" : "move";
          event.preventDefault();
        }
        break;
      case "drop":
        event.preventDefault();
        this._drop(event.dataTransfer, row.folder, event.ctrlKey);
        break;
    }
  }

  _onKey(event, row) {
    const rtl = this.list.matches(":dir(rtl)");
    switch (event.key) {
      case rtl ? "ArrowLeft" : "ArrowRight":
        if (row.ariaExpanded === "false") {
          this.toggle(row);
        } else {
          this.select(row.querySelector("[role=treeitem]") ?? row);
        }
        break;
      case rtl ? "ArrowRight" : "ArrowLeft":
        if (row.ariaExpanded === "true") {
          this.toggle(row);
        } else {
          this.select(row.parentElement.closest("[role=treeitem]") ?? row);
        }
        break;
      case "ArrowDown":
      case "ArrowUp": {
        const visible = [...this.list.querySelectorAll("[role=treeitem]")].filter(
          r => !r.parentElement.closest("[aria-expanded=false]")
        );
        const at = visible.indexOf(row) + (event.key === "ArrowDown" ? 1 : -1);
        if (visible[at]) {
          this.select(visible[at]);
        }
        break;
      }
      case "*":
        this._openAll(row);
        break;
      default:
        return;
    }
    event.preventDefault();
  }

  toggle(row, open = row.ariaExpanded === "false") {
    if (row.ariaExpanded === null) {
      return;
    }
    if (open && !row.populated) {
      this._populate(row);
    }
    row.ariaExpanded = String(open);
    this.state.setItem(row.folder.uri, open ? "open" : "closed");
    // Closing a folder must not leave the selection on something invisible.
    if (!open && row.querySelector("[aria-selected=true]")) {
      this.select(row);
    }
  }

  select(row) {
    if (row.folder.flags & FLAG_NOSELECT) {
      row.focus();
      return;
    }
    this.list.querySelector("[aria-selected=true]")?.removeAttribute("aria-selected");
    row.ariaSelected = "true";
    row.focus({ preventScroll: true });
    row.firstElementChild.scrollIntoView({ block: "nearest" });
    this.list.dispatchEvent(new CustomEvent("folderselect", { detail: row.folder }));
  }

  _compare(a, b) {
    const rank = f => SORT_RANK.get(f.flags & (FLAG_INBOX | FLAG_SENT | FLAG_TRASH)) ?? 1;
    return rank(a) - rank(b) || this.collator.compare(a.name, b.name);
  }

  _createRow(folder, level) {
    const row = document.createElement("li");
    row.setAttribute("role", "treeitem");
    row.tabIndex = -1;
    row.ariaLevel = level;
    row.folder = folder;
    this.rows.set(folder.uri, row);

    const label = document.createElement("div");
    label.className = "label";
    label.append(
      Object.assign(document.createElement("span"), { className: "twisty" }),
      Object.assign(document.createElement("span"), { className: "name", textContent: folder.name }),
      Object.assign(document.createElement("span"), { className: "unread" })
    );
    row.appendChild(label);
    this._showUnread(row);

    if (folder.hasSubFolders) {
      row.ariaExpanded = "false";
      if (this.state.getItem(folder.uri) === "open") {
        this.toggle(row, true);
      }
    }
    return row;
  }

  _populate(row) {
    const group = document.createElement("ul");
    group.setAttribute("role", "group");
    const children = [...row.folder.subFolders].sort((a, b) => this._compare(a, b));
    for (const child of children) {
      group.appendChild(this._createRow(child, Number(row.ariaLevel) + 1));
    }
    row.appendChild(group);
    row.populated = true;
  }

  _showUnread(row) {
    const closed = row.ariaExpanded === "false";
    const n = row.folder.getNumUnread(closed);
    row.querySelector(".unread").textContent = n > 0 ? n.toLocaleString() : "";
    row.classList.toggle("has-unread", n > 0);
  }

  // FolderListener

  onUnreadChanged(folder) {
    for (let f = folder; f; f = f.parent) {
      const row = this.rows.get(f.uri);
      if (row) {
        this._showUnread(row);
      }
    }
  }

  onFolderRemoved(folder) {
    const row = this.rows.get(folder.uri);
    if (!row) {
      return;
    }
    if (row.querySelector("[aria-selected=true]") || row.ariaSelected === "true") {
      this.select(this.rows.get(folder.parent.uri));
    }
    for (const uri of [...this.rows.keys()]) {
      if (uri === folder.uri || uri.startsWith(folder.uri + "/")) {
        this.rows.delete(uri);
      }
    }
    row.remove();
  }
}

# Heron, a screen reader
#
# Whoever changes what is spoken should first listen to the old words for a
# week with the screen switched off.

"""Turns an accessible object into the words that are spoken for it."""

__copyright__ = "Copyright (c) the Heron Team"
__license__ = "LGPL"

import gi
gi.require_version("Atspi", "2.0")
from gi.repository import Atspi

from heron import debug
from heron import messages
from heron import settings_manager
from heron.ax_object import AXObject
from heron.ax_value import AXValue
from heron.heron_i18n import _, C_, ngettext

_settings = settings_manager.getManager()

# Roles whose name is never spoken because the contents say it all.
SILENT_ROLES = frozenset([
    Atspi.Role.PARAGRAPH,
    Atspi.Role.SECTION,
    Atspi.Role.FILLER,
    Atspi.Role.PANEL,
])


class SpeechGenerator:

    def __init__(self, script):
        self._script = script
        self._activeProgressBars = {}

    def generate(self, obj, **args):
        result = []
        for method in self._methodsFor(obj):
            try:
                result.extend(method(obj, **args))
            except Exception as error:
                # The application may have died between two questions.
                tokens = ["SPEECH:", method.__name__, "failed for", obj, error]
                debug.printTokens(debug.LEVEL_INFO, tokens, True)
        debug.printTokens(debug.LEVEL_INFO, ["SPEECH:", obj, "->", result], True)
        return [part for part in result if part]

    def _methodsFor(self, obj):
        role = AXObject.get_role(obj)
        if role in (Atspi.Role.CHECK_BOX, Atspi.Role.CHECK_MENU_ITEM):
            return [self._label, self._roleName, self._checkedState, self._availability,
                    self._mnemonic]
        if role == Atspi.Role.TOGGLE_BUTTON:
            return [self._label, self._roleName, self._pressedState, self._availability]
        if role in (Atspi.Role.SLIDER, Atspi.Role.SPIN_BUTTON):
            return [self._label, self._roleName, self._value, self._required, self._availability]
        if role == Atspi.Role.TREE_ITEM:
            return [self._label, self._expandedState, self._nodeLevel, self._positionInSet]
        if role == Atspi.Role.TABLE_CELL:
            return [self._newRowHeader, self._newColumnHeader, self._label, self._value]
        return [self._label, self._roleName, self._required, self._availability, self._mnemonic]

    def _label(self, obj, **args):
        name = AXObject.get_name(obj) or self._script.utilities.displayedLabel(obj)
        if name:
            return [name]
        description = AXObject.get_description(obj)
        if description:
            return [description]
        if _settings.getSetting("speakUnlabelled"):
            # Translators: Heron says this for a button, entry, etc. to which
            # the developer of the application gave neither a name nor a label.
            return [_("unlabelled")]
        return []

    def _roleName(self, obj, **args):
        if args.get("sameRoleAsBefore") or AXObject.get_role(obj) in SILENT_ROLES:
            return []
        return [AXObject.get_localized_role_name(obj)]

    def _checkedState(self, obj, **args):
        if AXObject.has_state(obj, Atspi.StateType.INDETERMINATE):
            # Translators: this is the state of a checkbox that stands for
            # several things of which some are checked and some are not.
            return [C_("checkbox", "partially checked")]
        if AXObject.has_state(obj, Atspi.StateType.CHECKED):
            return [C_("checkbox", "checked")]
        return [C_("checkbox", "not checked")]

    def _pressedState(self, obj, **args):
        if AXObject.has_state(obj, Atspi.StateType.PRESSED):
            return [C_("togglebutton", "pressed")]
        return [C_("togglebutton", "not pressed")]

    def _expandedState(self, obj, **args):
        if not AXObject.has_state(obj, Atspi.StateType.EXPANDABLE):
            return []
        if AXObject.has_state(obj, Atspi.StateType.EXPANDED):
            count = AXObject.get_child_count(obj)
            # Translators: spoken for an open folder in a tree.
            return [_("expanded"), ngettext("%d item", "%d items", count) % count]
        return [_("collapsed")]

    def _availability(self, obj, **args):
        if AXObject.has_state(obj, Atspi.StateType.SENSITIVE):
            return []
        # Translators: a control that is greyed out.
        return [_("unavailable")]

    def _required(self, obj, **args):
        return [messages.REQUIRED] if AXObject.has_state(obj, Atspi.StateType.REQUIRED) else []

    def _value(self, obj, **args):
        value = AXValue.get_current(obj)
        if value is None:
            return []
        minimum, maximum = AXValue.get_range(obj)
        if (minimum, maximum) == (0, 100):
            return [_("%d percent") % round(value)]
        # 0.30000000000000004 is not what anybody wants to hear
        return ["%g" % round(value, 6)]

    def _nodeLevel(self, obj, **args):
        level = self._script.utilities.nodeLevel(obj)
        if level < 0 or level == args.get("previousLevel"):
            return []
        # Translators: how deep inside a tree the item is, counted from 1.
        return [_("tree level %d") % (level + 1)]

    def _positionInSet(self, obj, **args):
        if not _settings.getSetting("speakPosition"):
            return []
        position, total = self._script.utilities.positionAndSize(obj)
        if total < 1:
            return []
        # Translators: as in "3 of 12" when moving through a list.
        return [_("%(index)d of %(total)d") % {"index": position + 1, "total": total}]

    def _mnemonic(self, obj, **args):
        if args.get("alreadyFocused") or not _settings.getSetting("speakMnemonics"):
            return []
        return [self._script.utilities.mnemonic(obj)]

    def _newRowHeader(self, obj, **args):
        return self._header(obj, "row", args.get("previous"))

    def _newColumnHeader(self, obj, **args):
        return self._header(obj, "column", args.get("previous"))

    def _header(self, obj, axis, previous):
        now = self._script.utilities.header(obj, axis)
        if previous is not None and self._script.utilities.header(previous, axis) == now:
            return []
        return [AXObject.get_name(now)] if now else []

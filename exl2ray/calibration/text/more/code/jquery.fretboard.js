/*
 * jQuery fretboard plugin, 1.4 (2011)
 * Draws guitar chords into empty elements: <span class="chord" data-chord="x32010" title="C"></span>
 * Works down to IE 7, where there is no canvas and a table is drawn instead.
 */
;(function ($, window, document, undefined) {
    'use strict';

    var pluginName = 'fretboard',
        hasCanvas = !!document.createElement('canvas').getContext,
        defaults = {
            width: 64,
            height: 84,
            frets: 4,
            leftHanded: false,
            colour: '#222',
            onClick: $.noop
        };

    // "x32010" or, above the ninth fret, "x-10-12-12-11-10"
    function parse(text) {
        var parts = text.indexOf('-') >= 0 ? text.split('-') : text.split('');
        return $.map(parts, function (p) {
            return (/^x$/i).test(p) ? -1 : parseInt(p, 10);
        });
    }

    function Fretboard(element, options) {
        this.$el = $(element);
        this.options = $.extend({}, defaults, options, this.$el.data());
        this.strings = parse(String(this.$el.attr('data-chord') || ''));
        if (this.strings.length < 4 || $.grep(this.strings, isNaN).length) {
            this.$el.addClass('chord-error').text('?');
            return;
        }
        if (this.options.leftHanded) {
            this.strings.reverse();
        }
        this.base = this._base();
        this[hasCanvas ? '_canvas' : '_table']();
        this.$el.bind('click.' + pluginName, $.proxy(this._click, this));
    }

    $.extend(Fretboard.prototype, {

        // Chords that fit into the first frets are drawn with the nut, others from their lowest fret.
        _base: function () {
            var pressed = $.grep(this.strings, function (f) { return f > 0; }),
                high = Math.max.apply(null, pressed.concat(0));
            return high <= this.options.frets ? 1 : Math.min.apply(null, pressed);
        },

        _canvas: function () {
            var o = this.options, n = this.strings.length, self = this,
                canvas = $('<canvas/>').attr({ width: o.width, height: o.height, role: 'img', 'aria-label': this._spoken() })[0],
                c = canvas.getContext('2d'),
                left = 12, top = 16,
                dx = (o.width - left - 6) / (n - 1),
                dy = (o.height - top - 4) / o.frets,
                i;
            c.strokeStyle = c.fillStyle = o.colour;
            c.font = '10px sans-serif';
            c.textAlign = 'center';
            c.beginPath();
            for (i = 0; i < n; i++) {
                // half a pixel, or the lines come out two pixels wide and grey
                c.moveTo(Math.round(left + i * dx) + 0.5, top);
                c.lineTo(Math.round(left + i * dx) + 0.5, top + o.frets * dy);
            }
            for (i = 0; i <= o.frets; i++) {
                c.moveTo(left, Math.round(top + i * dy) + 0.5);
                c.lineTo(left + (n - 1) * dx, Math.round(top + i * dy) + 0.5);
            }
            c.stroke();
            if (this.base === 1) {
                c.fillRect(left, top - 3, (n - 1) * dx + 1, 3);
            } else {
                c.fillText(this.base, 5, top + dy * 0.7);
            }
            $.each(this.strings, function (s, fret) {
                var x = left + s * dx;
                if (fret < 0) {
                    c.fillText('\u00d7', x, top - 5);
                } else if (fret === 0) {
                    c.beginPath();
                    c.arc(x, top - 8, 3, 0, 2 * Math.PI, false);
                    c.stroke();
                } else {
                    c.beginPath();
                    c.arc(x, top + (fret - self.base + 0.5) * dy, Math.min(dx, dy) * 0.35, 0, 2 * Math.PI, false);
                    c.fill();
                }
            });
            this.$el.empty().append(canvas);
        },

        _table: function () {
            var rows = [], f, s, cells;
            for (f = 0; f < this.options.frets; f++) {
                cells = [];
                for (s = 0; s < this.strings.length; s++) {
                    cells.push('<td>' + (this.strings[s] === f + this.base ? '&bull;' : '&nbsp;') + '</td>');
                }
                rows.push('<tr>' + cells.join('') + '</tr>');
            }
            this.$el.html('<table class="fretboard" cellspacing="0">' + rows.join('') + '</table>');
        },

        _spoken: function () {
            return (this.$el.attr('title') || 'chord') + ': ' + $.map(this.strings, function (f) {
                return f < 0 ? 'mute' : f === 0 ? 'open' : 'fret ' + f;
            }).join(', ');
        },

        _click: function (event) {
            // returning false from the callback keeps the page from scrolling to the "#" of a surrounding link
            return this.options.onClick.call(this.$el[0], this.strings.slice(0), event);
        },

        destroy: function () {
            this.$el.unbind('.' + pluginName).removeData('plugin_' + pluginName).empty();
        }
    });

    $.fn[pluginName] = function (options) {
        return this.each(function () {
            var old = $.data(this, 'plugin_' + pluginName);
            if (!old) {
                $.data(this, 'plugin_' + pluginName, new Fretboard(this, options));
            } else if (typeof options === 'string' && options.charAt(0) !== '_' && $.isFunction(old[options])) {
                old[options]();
            }
        });
    };

    $(function () {
        $('.chord[data-chord]')[pluginName]();
    });

}(jQuery, window, document));

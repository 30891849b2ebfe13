# frozen_string_literal: true

require "time"
require "forwardable"

# A firing schedule in a small language of its own:
#
#   schedule = Kiln.schedule "bisque, thick ware" do
#     ramp   to: 120, at: 60
#     hold   2.hours, note: "steam out of the spyhole?"
#     ramp   to: 600, at: 90
#     ramp   to: 1000, at: 150
#     cool   to: 200
#   end
module Kiln
  class ScheduleError < StandardError; end

  module Durations
    refine Numeric do
      def hours = self * 3600
      def minutes = self * 60
      alias_method :hour, :hours
      alias_method :minute, :minutes
    end
  end
  using Durations

  QUARTZ = (560..585).freeze # crossing it fast cracks the ware
  MAX_RATE = 300

  Segment = Struct.new(:kind, :from, :to, :seconds, :note, keyword_init: true) do
    def rate = seconds.zero? ? 0 : (to - from) / (seconds / 3600.0)

    def crosses?(range)
      low, high = [from, to].minmax
      low < range.end && high > range.begin
    end

    def temperature_after(elapsed)
      from + (to - from) * (elapsed / seconds.to_f).clamp(0.0, 1.0)
    end
  end

  class Schedule
    extend Forwardable
    include Enumerable

    attr_reader :name, :warnings

    def_delegators :@segments, :each, :size

    def initialize(name, start: 20)
      @name = name
      @segments = []
      @current = start
      @warnings = []
    end

    def ramp(to:, at:)
      raise ScheduleError, "ramp to #{to} °C goes downwards, use cool" if to <= @current
      raise ScheduleError, "#{at} °C/h is more than the elements can do" if at > MAX_RATE

      append(:ramp, to, (to - @current) / at.to_f * 3600)
    end

    def hold(seconds, note: nil)
      append(:hold, @current, seconds, note)
    end

    # Without a rate the kiln is switched off, and loses about a fifth of its excess heat every hour.
    def cool(to:, at: nil)
      raise ScheduleError, "cannot cool from #{@current} to #{to} °C" if to >= @current

      seconds = if at
                  (@current - to) / at.to_f * 3600
                else
                  Math.log((@current - 20) / (to - 20.0)) / -Math.log(0.8) * 3600
                end
      append(:cool, to, seconds)
    end

    def duration = sum(&:seconds)

    def temperature_at(elapsed)
      each do |segment|
        return segment.temperature_after(elapsed) if elapsed <= segment.seconds

        elapsed -= segment.seconds
      end
      @current
    end

    def to_s
      rows = map do |s|
        arrow = { ramp: "↗", hold: "→", cool: "↘" }.fetch(s.kind)
        line = format("%s %4d °C  %6s", arrow, s.to, hhmm(s.seconds))
        line += format("  %+4d °C/h", s.rate.round) unless s.kind == :hold
        s.note ? "#{line}  (#{s.note})" : line
      end
      [name, *rows, "total #{hhmm(duration)}", *warnings.map { |w| "! #{w}" }].join("\n")
    end

    private

    def append(kind, to, seconds, note = nil)
      segment = Segment.new(kind:, from: @current, to:, seconds: seconds.round, note:)
      if segment.crosses?(QUARTZ) && segment.rate.abs > 120
        @warnings << "#{segment.rate.round} °C/h through quartz inversion in step #{size + 1}"
      end
      @segments << segment
      @current = to
      self
    end

    def hhmm(seconds)
      format("%d:%02d", *(seconds.round / 60).divmod(60))
    end
  end

  def self.schedule(name, **options, &block)
    Schedule.new(name, **options).tap { |s| s.instance_eval(&block) }
  end

  # Compares a thermocouple log ("2024-05-03T06:10:00 431.5") with the plan.
  class Watch
    TOLERANCE = 15

    def initialize(schedule, started)
      @schedule = schedule
      @started = started
    end

    def check(lines)
      return enum_for(:check, lines) unless block_given?

      lines.each do |line|
        stamp, reading = line.split
        next unless reading

        elapsed = Time.parse(stamp) - @started
        wanted = @schedule.temperature_at(elapsed)
        difference = Float(reading) - wanted
        yield elapsed, wanted, difference if difference.abs > TOLERANCE
      end
    end
  end
end

if $PROGRAM_NAME == __FILE__
  using Kiln::Durations

  glaze = Kiln.schedule "celadon, cone 6" do
    ramp to: 600, at: 140
    ramp to: 1120, at: 180
    ramp to: 1222, at: 60
    hold 15.minutes, note: "witness cone down?"
    cool to: 980, at: 80
    hold 0.5.hours
    cool to: 90
  end
  puts glaze
end

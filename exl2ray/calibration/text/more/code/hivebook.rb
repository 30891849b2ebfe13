# frozen_string_literal: true

require "date"
require "optparse"
require "yaml"

# The hive book: one YAML file per apiary, one command per thing a beekeeper does with gloves on.
#
#   hivebook inspect 7 --queen seen --brood 5 --stores 2 --note "calm, two cups without eggs"
#   hivebook due
#   hivebook show 7
module HiveBook
  class Error < StandardError; end

  Inspection = Struct.new(:date, :queen, :brood, :stores, :note, keyword_init: true) do
    def queenless? = queen == "none" && brood.zero?

    def to_s
      format("%s  queen %-5s  brood %d  stores %d  %s", date, queen, brood, stores, note).rstrip
    end
  end

  class Hive
    attr_reader :number, :inspections

    def self.load(number, rows)
      new(number, rows.map { |r| Inspection.new(**r.transform_keys(&:to_sym)) })
    end

    def initialize(number, inspections = [])
      @number = number
      @inspections = inspections.sort_by(&:date)
    end

    def add(inspection)
      if (last = inspections.last) && last.date > inspection.date
        raise Error, "hive #{number} was already looked into on #{last.date}"
      end

      inspections << inspection
    end

    # Swarming season needs a look every nine days: a capped queen cell follows the egg by eight, and a colony
    # rarely leaves before. Outside the season the intervals are about food and mites.
    def next_due(today = Date.today)
      last = inspections.last or return today
      return last.date + 3 if last.queenless?

      last.date + interval(last.date)
    end

    def warnings
      last = inspections.last or return ["never inspected"]
      list = []
      list << "no queen and no brood" if last.queenless?
      list << "feed: #{last.stores} frame(s) of stores" if last.stores < 2
      list << "brood nest shrinking" if inspections.last(3).map(&:brood).then { |b| b.size == 3 && b.each_cons(2).all? { |x, y| y < x } }
      list
    end

    def dump = inspections.map { |i| i.to_h.transform_keys(&:to_s) }

    private

    def interval(date)
      case date.month
      when 4..7 then 9
      when 8..10 then 21
      else 45
      end
    end
  end

  class Apiary
    include Enumerable

    def initialize(path)
      @path = path
      raw = File.exist?(path) ? YAML.safe_load_file(path, permitted_classes: [Date]) : {}
      @hives = (raw || {}).to_h { |n, rows| [n, Hive.load(n, rows)] }
    end

    def each(&) = @hives.sort.map(&:last).each(&)

    def [](number) = @hives.fetch(number) { raise Error, "there is no hive #{number}" }

    def found(number) = @hives[number] ||= Hive.new(number)

    # Written next to the old file and renamed: the phone this runs on has been dropped into a smoker before.
    def save
      temp = "#{@path}.new"
      File.write(temp, YAML.dump(@hives.transform_values(&:dump)))
      File.rename(temp, @path)
    end
  end

  module CLI
    QUEEN = %w[seen eggs none].freeze

    module_function

    def run(argv, out: $stdout, today: Date.today)
      apiary = Apiary.new(ENV.fetch("HIVEBOOK", File.join(Dir.home, ".hivebook.yml")))
      case command = argv.shift
      when "inspect" then inspect_hive(apiary, argv, today)
      when "show" then show(apiary, argv, out)
      when "due" then due(apiary, out, today)
      else raise Error, "unknown command #{command.inspect}; try inspect, show or due"
      end
      0
    rescue Error, OptionParser::ParseError => e
      warn "hivebook: #{e.message}"
      1
    end

    def inspect_hive(apiary, argv, today)
      values = { date: today, queen: "eggs", brood: 0, stores: 0, note: nil }
      OptionParser.new do |o|
        o.on("--queen STATE", QUEEN) { values[:queen] = _1 }
        o.on("--brood FRAMES", Integer) { values[:brood] = _1 }
        o.on("--stores FRAMES", Integer) { values[:stores] = _1 }
        o.on("--note TEXT") { values[:note] = _1 }
        o.on("--date DATE") { values[:date] = Date.parse(_1) }
      end.parse!(argv)
      apiary.found(number_from(argv)).add(Inspection.new(**values))
      apiary.save
    end

    def show(apiary, argv, out)
      hive = apiary[number_from(argv)]
      out.puts hive.inspections.reverse.first(10)
      hive.warnings.each { |w| out.puts "  ! #{w}" }
    end

    def due(apiary, out, today)
      apiary.group_by { |h| h.next_due(today) }.sort.each do |date, hives|
        break if date > today + 7

        overdue = date < today ? " (#{(today - date).to_i} days late)" : ""
        out.puts "#{date.strftime('%a %d %b')}#{overdue}: #{hives.map(&:number).join(', ')}"
      end
    end

    def number_from(argv)
      Integer(argv.shift || raise(Error, "which hive?"), 10)
    rescue ArgumentError
      raise Error, "a hive has a number"
    end
  end
end

exit HiveBook::CLI.run(ARGV) if $PROGRAM_NAME == __FILE__

# frozen_string_literal: true

require "spec_helper"
require "model_railway/interlocking"

RSpec.describe ModelRailway::Interlocking do
  subject(:box) { described_class.load(<<~YARD) }
    track a1, a2, b1, b2, siding
    turnout w1: a1 -> straight a2, branching b1
    turnout w2: b1 -> straight b2, branching siding
    signal  s1 before a1
    signal  s9 before siding, facing down
    route   main:  s1 a1 w1+ a2
    route   yard:  s1 a1 w1- b1 w2- siding
    route   out:   s9 siding w2- b1 w1- a1
  YARD

  def occupy(*names) = names.each { |n| box.track(n).occupied = true }

  describe "#set" do
    it "throws the turnouts before the signal clears" do
      events = []
      box.on_change { |element, state| events << "#{element.name} #{state}" }
      box.set(:yard)
      expect(events).to eq ["w1 branching", "w2 branching", "s1 clear"]
    end

    it "locks what lies in the route" do
      box.set(:main)
      expect { box.turnout(:w1).throw!(:branching) }
        .to raise_error(ModelRailway::Locked, /w1 is part of route main/)
    end

    context "when a wagon stands on the branch" do
      before { occupy(:b1) }

      it "refuses the yard but not the main line" do
        expect(box.set(:yard)).to be_refused.and have_attributes(reason: "b1 is occupied")
        expect(box.set(:main)).to be_granted
      end

      it "allows shunting at sight, with the lower quadrant only" do
        expect(box.set(:yard, shunting: true)).to be_granted
        expect(box.signal(:s1).aspect).to eq :caution
      end
    end

    it "never grants two routes that share a piece of track" do
      names = %i[main yard out]
      names.permutation(2) do |first, second|
        fresh = box.dup_idle
        fresh.set(first)
        expect(fresh.set(second)).to be_refused, "#{second} was granted after #{first}"
      end
    end
  end

  describe "releasing behind the train" do
    before { box.set(:yard) }

    it "puts the signal to danger as soon as the first axle has passed" do
      expect { occupy(:a1) }.to change { box.signal(:s1).aspect }.from(:clear).to(:danger)
    end

    it "frees a turnout only when the next track is occupied and its own is empty" do
      occupy(:a1)
      occupy(:b1)
      expect(box.turnout(:w1)).to be_locked
      box.track(:a1).occupied = false
      expect(box.turnout(:w1)).not_to be_locked
      expect(box.turnout(:w2)).to be_locked
    end

    # A dirty wheel loses contact for a moment; the cat walking over the layout does the opposite.
    it "is not fooled by a flicker shorter than 400 ms", :fake_clock do
      occupy(:a1)
      box.track(:a1).occupied = false
      clock.advance(0.3)
      box.track(:a1).occupied = true
      clock.advance(1)
      expect(box.turnout(:w1)).to be_locked
    end

    it "ignores a track that is occupied out of order and rings the bell" do
      bell = instance_double(ModelRailway::Bell, ring: nil)
      box.bell = bell
      occupy(:siding)
      expect(bell).to have_received(:ring).with(:unexpected, :siding)
      expect(box.route(:yard)).to be_set
    end
  end

  describe "#cancel" do
    it "takes effect at once when no train is near" do
      box.set(:main)
      box.cancel(:main)
      expect(box.turnout(:w1)).not_to be_locked
    end

    it "waits a minute when one is approaching", :fake_clock do
      box.set(:out)
      occupy(:siding)
      box.cancel(:out)
      expect(box.signal(:s9).aspect).to eq :danger
      expect { clock.advance(61) }.to change { box.turnout(:w2).locked? }.from(true).to(false)
    end
  end

  describe ".load" do
    {
      "turnout w3: zz -> straight a, branching b" => "line 1: no track called zz",
      "track a\nroute r: s a" => "line 2: a route begins at a signal, and there is no signal s",
      "track a, a" => "line 1: a is there twice"
    }.each do |text, message|
      it("says #{message.inspect}") { expect { described_class.load(text) }.to raise_error(ModelRailway::PlanError, message) }
    end
  end
end

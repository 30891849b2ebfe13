-- Quadrature decoder with index pulse, velocity latch and a glitch counter.
--
-- A and B come from a shaft encoder over four metres of cable next to a frequency converter, so
-- both are synchronised, then majority-filtered over FILTER samples. At 50 MHz and FILTER = 4 the
-- shortest accepted level is 80 ns; the 2500-line disc at 6000 rpm gives 1 us per state.

library ieee;
use ieee.std_logic_1164.all;
use ieee.numeric_std.all;

entity quadrature is
  generic (
    WIDTH  : positive range 8 to 32 := 24;
    FILTER : positive range 2 to 16 := 4;
    GATE   : positive               := 50_000   -- clocks per velocity sample, 1 ms
  );
  port (
    clk       : in  std_logic;
    rst       : in  std_logic;                  -- synchronous, active high
    enc_a     : in  std_logic;
    enc_b     : in  std_logic;
    enc_z     : in  std_logic;
    arm_z     : in  std_logic;                  -- zero the count at the next index pulse
    count     : out signed(WIDTH - 1 downto 0);
    velocity  : out signed(15 downto 0);        -- edges in the last gate
    vel_strb  : out std_logic;
    homed     : out std_logic;
    glitches  : out unsigned(7 downto 0)        -- saturates at 255
  );
end entity quadrature;

architecture rtl of quadrature is

  type pipe_t is array (natural range <>) of std_logic_vector(2 downto 0);
  signal meta, sync : std_logic_vector(2 downto 0) := (others => '0');
  signal hist       : pipe_t(FILTER - 1 downto 0) := (others => (others => '0'));
  signal clean      : std_logic_vector(2 downto 0) := (others => '0');
  signal previous   : std_logic_vector(1 downto 0) := (others => '0');

  signal position   : signed(WIDTH - 1 downto 0) := (others => '0');
  signal in_gate    : signed(15 downto 0) := (others => '0');
  signal gate_cnt   : natural range 0 to GATE - 1 := 0;
  signal bad        : unsigned(7 downto 0) := (others => '0');
  signal armed      : std_logic := '0';
  signal z_before   : std_logic := '0';

  attribute async_reg : string;
  attribute async_reg of meta, sync : signal is "true";

  -- +1, -1, 0 or "both bits changed", which a real shaft cannot do between two clocks
  type step_t is (STAY, FORWARD, BACKWARD, ILLEGAL);

  function step_of(old, new_ab : std_logic_vector(1 downto 0)) return step_t is
    variable both : std_logic_vector(3 downto 0);
  begin
    both := old & new_ab;
    case both is
      when "0001" | "0111" | "1110" | "1000" => return FORWARD;
      when "0010" | "1011" | "1101" | "0100" => return BACKWARD;
      when "0000" | "0101" | "1010" | "1111" => return STAY;
      when others                            => return ILLEGAL;
    end case;
  end function;

begin

  -- Level is taken over only when all samples agree; otherwise keep what we had.
  input_filter : process (clk)
    variable all_one, all_zero : std_logic;
  begin
    if rising_edge(clk) then
      meta <= enc_z & enc_b & enc_a;
      sync <= meta;
      hist <= hist(FILTER - 2 downto 0) & sync;
      for line in clean'range loop
        all_one  := '1';
        all_zero := '1';
        for k in hist'range loop
          all_one  := all_one  and hist(k)(line);
          all_zero := all_zero and not hist(k)(line);
        end loop;
        if all_one = '1' then
          clean(line) <= '1';
        elsif all_zero = '1' then
          clean(line) <= '0';
        end if;
      end loop;
    end if;
  end process;

  counter : process (clk)
    variable step  : step_t;
    variable delta : integer range -1 to 1;
  begin
    if rising_edge(clk) then
      vel_strb <= '0';
      previous <= clean(1 downto 0);
      z_before <= clean(2);
      step     := step_of(previous, clean(1 downto 0));

      case step is
        when FORWARD  => delta := 1;
        when BACKWARD => delta := -1;
        when others   => delta := 0;
      end case;

      if step = ILLEGAL and bad /= 255 then
        bad <= bad + 1;
      end if;

      position <= position + delta;

      if gate_cnt = GATE - 1 then
        gate_cnt <= 0;
        velocity <= in_gate + delta;
        in_gate  <= (others => '0');
        vel_strb <= '1';
      else
        gate_cnt <= gate_cnt + 1;
        in_gate  <= in_gate + delta;
      end if;

      -- The index is wider than one state on this disc: take the rising edge, and only when moving
      -- forward, otherwise home would differ by the width of the slot.
      if arm_z = '1' then
        armed <= '1';
        homed <= '0';
      elsif armed = '1' and clean(2) = '1' and z_before = '0' and step /= BACKWARD then
        position <= (others => '0');
        armed    <= '0';
        homed    <= '1';
      end if;

      if rst = '1' then
        position <= (others => '0');
        in_gate  <= (others => '0');
        gate_cnt <= 0;
        bad      <= (others => '0');
        armed    <= '0';
        homed    <= '0';
      end if;
    end if;
  end process;

  count    <= position;
  glitches <= bad;

end architecture rtl;

defmodule Chess.Clock do
  @moduledoc """
  A chess clock as a process.

  Two sides, one running at a time. Supports a Fischer increment and a Bronstein delay. All times are
  milliseconds of monotonic time; the wall clock may jump, the clock on the table does not.

      {:ok, clock} = Chess.Clock.start_link(base: 5 * 60_000, bonus: {:fischer, 3_000}, owner: self())
      Chess.Clock.press(clock, :black)   # white's time begins
  """

  use GenServer

  @type side :: :white | :black
  @type bonus :: :none | {:fischer, pos_integer} | {:bronstein, pos_integer}

  defstruct [:owner, :running, :since, :timer, bonus: :none, left: %{}, presses: 0]

  # Client

  def start_link(opts) do
    {gen_opts, opts} = Keyword.split(opts, [:name])
    GenServer.start_link(__MODULE__, opts, gen_opts)
  end

  @doc """
  `side` has moved and presses the button. Pressing while it is not one's turn is ignored,
  as it is with the wooden kind: the lever is already down.
  """
  @spec press(GenServer.server(), side) :: {:ok, map} | {:error, :flag_fallen}
  def press(clock, side) when side in [:white, :black], do: GenServer.call(clock, {:press, side})

  @doc "The arbiter stops both clocks."
  def pause(clock), do: GenServer.call(clock, :pause)

  @doc "Arbiter's correction, positive or negative."
  def adjust(clock, side, ms), do: GenServer.call(clock, {:adjust, side, ms})

  def read(clock), do: GenServer.call(clock, :read)

  # Server

  @impl true
  def init(opts) do
    base = Keyword.fetch!(opts, :base)

    left =
      case base do
        %{white: _, black: _} = both -> both
        ms when is_integer(ms) -> %{white: ms, black: ms}
      end

    {:ok, %__MODULE__{owner: opts[:owner], bonus: opts[:bonus] || :none, left: left}}
  end

  @impl true
  def handle_call({:press, _}, _from, %{running: :fallen} = s), do: {:reply, {:error, :flag_fallen}, s}

  def handle_call({:press, side}, _from, %{running: running} = s) when running in [nil, side] do
    s = s |> charge() |> start(other(side))
    {:reply, {:ok, shown(s)}, %{s | presses: s.presses + 1}}
  end

  def handle_call({:press, _side}, _from, s), do: {:reply, {:ok, shown(s)}, s}

  def handle_call(:pause, _from, %{running: :fallen} = s), do: {:reply, {:error, :flag_fallen}, s}

  def handle_call(:pause, _from, s) do
    # no bonus for a pause: nobody has moved
    s = s |> spend() |> cancel()
    {:reply, {:ok, s.left}, %{s | running: nil, since: nil}}
  end

  def handle_call({:adjust, side, ms}, _from, s) do
    s = spend(s)
    s = put_in(s.left[side], max(0, s.left[side] + ms))
    s = if s.running in [:white, :black], do: start(s, s.running), else: s
    {:reply, {:ok, shown(s)}, s}
  end

  def handle_call(:read, _from, s), do: {:reply, shown(s), s}

  @impl true
  def handle_info({:flag, ref, side}, %{timer: {ref, _}} = s) do
    if s.owner, do: send(s.owner, {:flag_fallen, side})
    {:noreply, %{s | running: :fallen, since: nil, timer: nil, left: Map.put(s.left, side, 0)}}
  end

  # A timer that was cancelled too late; its reference is no longer ours.
  def handle_info({:flag, _ref, _side}, s), do: {:noreply, s}

  # Time keeping

  defp charge(%{running: nil} = s), do: s

  defp charge(%{running: side} = s) do
    used = now() - s.since
    s = spend(s)

    extra =
      case s.bonus do
        :none -> 0
        {:fischer, ms} -> ms
        {:bronstein, ms} -> min(ms, used)
      end

    update_in(s.left[side], &(&1 + extra))
  end

  defp spend(%{running: side, since: since} = s) when side in [:white, :black] do
    t = now()
    %{s | left: Map.update!(s.left, side, &max(0, &1 - (t - since))), since: t}
  end

  defp spend(s), do: s

  defp start(s, side) do
    s = cancel(s)
    ref = make_ref()
    timer = Process.send_after(self(), {:flag, ref, side}, s.left[side])
    %{s | running: side, since: now(), timer: {ref, timer}}
  end

  defp cancel(%{timer: nil} = s), do: s

  defp cancel(%{timer: {_, timer}} = s) do
    Process.cancel_timer(timer)
    %{s | timer: nil}
  end

  defp shown(s), do: spend(s).left
  defp other(:white), do: :black
  defp other(:black), do: :white
  defp now, do: System.monotonic_time(:millisecond)
end

defimpl Inspect, for: Chess.Clock do
  def inspect(%{left: left, running: running}, _opts) do
    show = fn ms -> :io_lib.format("~B:~2..0B", [div(ms, 60_000), rem(div(ms, 1000), 60)]) end
    "#Clock<white #{show.(left[:white])} black #{show.(left[:black])} running #{Kernel.inspect(running)}>"
  end
end

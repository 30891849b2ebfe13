defmodule Auction.Lot do
  @moduledoc """
  One lot of a live auction, one process.

  Bids are serialised by the process mailbox, so "who was first" has an answer without locks. The
  hammer falls when nobody has bid for a while; each accepted bid winds the clock up again.
  """

  use GenServer, restart: :transient

  @quiet_ms 15_000

  defstruct [:id, :reserve, :leader, :timer, amount: 0, watchers: %{}, deadline_token: nil]

  @type bid_error :: :too_low | :own_bid | :closed
  @type outcome :: {:sold, String.t(), pos_integer()} | :passed_in

  # -- client ---------------------------------------------------------------

  def start_link(opts) do
    id = Keyword.fetch!(opts, :id)
    GenServer.start_link(__MODULE__, opts, name: via(id))
  end

  @doc "Places a bid. Returns the amount the next bidder has to reach."
  @spec bid(term(), String.t(), pos_integer()) :: {:ok, pos_integer()} | {:error, bid_error()}
  def bid(id, bidder, amount) when is_integer(amount) and amount > 0 do
    GenServer.call(via(id), {:bid, bidder, amount})
  catch
    # The lot closed between the look-up and the call. For the bidder that is simply "too late".
    :exit, {:noproc, _} -> {:error, :closed}
    :exit, {:normal, _} -> {:error, :closed}
  end

  @doc "Sends `{:lot, id, event}` messages to the caller until the lot or the caller ends."
  def watch(id), do: GenServer.call(via(id), {:watch, self()})

  defp via(id), do: {:via, Registry, {Auction.Registry, id}}

  # -- server ---------------------------------------------------------------

  @impl true
  def init(opts) do
    lot = %__MODULE__{id: opts[:id], reserve: Keyword.get(opts, :reserve, 0)}
    {:ok, wind_up(lot)}
  end

  @impl true
  def handle_call({:bid, bidder, _}, _from, %{leader: bidder} = lot) when not is_nil(bidder) do
    {:reply, {:error, :own_bid}, lot}
  end

  def handle_call({:bid, bidder, amount}, _from, lot) do
    if amount >= minimum(lot) do
      lot = wind_up(%{lot | leader: bidder, amount: amount})
      notify(lot, {:bid, bidder, amount})
      {:reply, {:ok, minimum(lot)}, lot}
    else
      {:reply, {:error, :too_low}, lot}
    end
  end

  def handle_call({:watch, pid}, _from, lot) do
    watchers = Map.put_new_lazy(lot.watchers, pid, fn -> Process.monitor(pid) end)
    {:reply, {lot.leader, lot.amount}, %{lot | watchers: watchers}}
  end

  @impl true
  def handle_info({:hammer, token}, %{deadline_token: token} = lot) do
    outcome =
      if lot.leader && lot.amount >= lot.reserve,
        do: {:sold, lot.leader, lot.amount},
        else: :passed_in

    notify(lot, outcome)
    {:stop, :normal, lot}
  end

  # Cancelling a timer does not take back a message that is already in the mailbox. The token
  # tells a stale hammer from the current one.
  def handle_info({:hammer, _stale}, lot), do: {:noreply, lot}

  def handle_info({:DOWN, _ref, :process, pid, _reason}, lot) do
    {:noreply, %{lot | watchers: Map.delete(lot.watchers, pid)}}
  end

  defp wind_up(lot) do
    if lot.timer, do: Process.cancel_timer(lot.timer)
    token = make_ref()
    %{lot | timer: Process.send_after(self(), {:hammer, token}, @quiet_ms), deadline_token: token}
  end

  defp minimum(%{amount: 0}), do: 1
  defp minimum(%{amount: amount}) when amount < 100, do: amount + 5
  defp minimum(%{amount: amount}) when amount < 1_000, do: amount + 25
  defp minimum(%{amount: amount}), do: amount + div(amount, 20)

  defp notify(lot, event) do
    for {pid, _ref} <- lot.watchers, do: send(pid, {:lot, lot.id, event})
    :ok
  end
end

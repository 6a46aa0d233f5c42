defmodule StarweaveImage.Queue.RateLimit do
  @moduledoc false
  # Token buckets, one for all callers together and one for each user. A bucket holds as many tokens as its limit allows
  # in one period, so a burst of that size is allowed, and refills evenly.

  @type limit :: {requests :: pos_integer, period_ms :: pos_integer} | nil
  @type t :: %__MODULE__{}

  # Above `prune_at` buckets, those that are full again are dropped: a missing bucket counts as full.
  @few 1_000
  defstruct [:all, :user, buckets: %{}, prune_at: @few]

  @spec new(all :: limit, user :: limit) :: t
  def new(all, user), do: %__MODULE__{all: all, user: user}

  @doc """
  Takes a token from each bucket that applies to `user` at `now` (ms); or takes none, and returns in how many ms there
  will be one.
  """
  @spec take(t, String.t() | nil, integer) :: {:ok, t} | {:wait, pos_integer}
  def take(%__MODULE__{} = limits, user, now) do
    wanted =
      for {key, limit} <- [{:all, limits.all}, {{:user, user}, user && limits.user}],
          limit != nil,
          do: {key, limit, level(limits.buckets[key], limit, now)}

    case for {_, {requests, token}, level} <- wanted,
             level < token,
             do: div(token - level + requests - 1, requests) do
      [] ->
        taken = for {key, {_, token}, level} <- wanted, do: {key, {level - token, now}}
        {:ok, pruned(%{limits | buckets: Enum.into(taken, limits.buckets)}, now)}

      waits ->
        {:wait, Enum.max(waits)}
    end
  end

  # The unit is 1 / `period` of a token, so that each ms adds exactly `requests` units and no fractions arise.
  defp level(nil, {requests, period}, _now), do: requests * period

  defp level({level, at}, {requests, period}, now),
    do: min(requests * period, level + (now - at) * requests)

  defp pruned(%{buckets: buckets, prune_at: most} = limits, _now) when map_size(buckets) <= most,
    do: limits

  defp pruned(limits, now) do
    buckets =
      Map.filter(limits.buckets, fn
        {:all, _} -> true
        {{:user, _}, bucket} -> level(bucket, limits.user, now) < level(nil, limits.user, now)
      end)

    %{limits | buckets: buckets, prune_at: max(@few, 2 * map_size(buckets))}
  end
end

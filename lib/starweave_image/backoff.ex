defmodule StarweaveImage.Backoff do
  @moduledoc false
  # How long to wait before something is tried again.

  @doc """
  The pause after so many failures in a row, in ms: exponential, half of it random.

      iex> StarweaveImage.Backoff.pause(0, {500, 30_000})
      0
      iex> StarweaveImage.Backoff.pause(2, {500, 30_000}) in 500..1000
      true
  """
  @spec pause(non_neg_integer, {pos_integer, pos_integer}) :: non_neg_integer
  def pause(0, _limits), do: 0

  def pause(failures, {first, most}) do
    pause = min(most, first * Integer.pow(2, min(failures - 1, 20)))
    div(pause, 2) + :rand.uniform(div(pause, 2) + 1) - 1
  end
end

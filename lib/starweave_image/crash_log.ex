defmodule StarweaveImage.CrashLog do
  @moduledoc false
  # What the log of a crash shows of a process: not its state and messages, which hold what users asked for.

  @doc "The callback `format_status/1` of whoever uses this module."
  defmacro __using__(_opts) do
    quote do
      # OTP has this callback since 25, Elixir knows it since 1.17.
      if Version.match?(System.version(), ">= 1.17.0"), do: @impl(true)
      @doc false
      def format_status(status), do: StarweaveImage.CrashLog.hidden(status)
    end
  end

  @doc "A status with the sizes of what it holds in place of it."
  @spec hidden(map) :: map
  def hidden(status) do
    Map.new(status, fn {key, value} ->
      {key, if(key in [:state, :message, :log], do: size(value), else: value)}
    end)
  end

  defp size(value), do: "(not shown: #{:erlang.external_size(value)} bytes)"
end

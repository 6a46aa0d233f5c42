defmodule StarweaveImage.Error do
  @moduledoc """
  Why a request did not end with an image.

  Every function of `StarweaveImage` that can fail returns `{:error, %StarweaveImage.Error{}}`;
  `StarweaveImage.generate!/2` raises it. The set of kinds is closed:

  | Kind | Meaning | Retry |
  |---|---|---|
  | `:invalid_request` | `details.field` names the wrong option; `details.conflict`: the `:id` is another request's | no |
  | `:model_not_found` | no such model, or it is not on this machine | no |
  | `:model_load_failed` | the model's files cannot be loaded | no |
  | `:overloaded` | the queue is full; try again after `details.retry_after_ms` | yes |
  | `:rate_limited` | this user, or all users together, ask too often; try again after `details.retry_after_ms` | yes |
  | `:timeout` | the deadline passed | yes |
  | `:cancelled` | somebody cancelled it | no |
  | `:out_of_memory` | the device has too little memory for it | no |
  | `:sidecar_crashed` | the request ends the Python process; the same one is refused for `details.retry_after_ms` | no |
  | `:unavailable` | the Python process cannot be started; the message says why | yes |
  | `:disabled` | the instance was started with `enabled: false` | no |
  | `:unsafe_content` | the model's safety checker refused the picture | no |
  | `:internal` | a fault of this library; or NaN or infinite numbers in the model, then `details.field` is `:model` | no |

  `message` is one sentence for a person. It holds no path, traceback or secret; those are in the log, with the
  request's id.

      iex> error = StarweaveImage.Error.new(:timeout, "the deadline of 50 ms passed")
      iex> {error.retryable?, Exception.message(error)}
      {true, "the deadline of 50 ms passed"}
  """

  @kinds [
    :invalid_request,
    :model_not_found,
    :model_load_failed,
    :overloaded,
    :rate_limited,
    :timeout,
    :cancelled,
    :out_of_memory,
    :sidecar_crashed,
    :unavailable,
    :disabled,
    :unsafe_content,
    :internal
  ]

  @retryable [:overloaded, :rate_limited, :timeout, :unavailable]

  @type kind ::
          :invalid_request
          | :model_not_found
          | :model_load_failed
          | :overloaded
          | :rate_limited
          | :timeout
          | :cancelled
          | :out_of_memory
          | :sidecar_crashed
          | :unavailable
          | :disabled
          | :unsafe_content
          | :internal

  @type t :: %__MODULE__{
          kind: kind,
          message: String.t(),
          details: map,
          retryable?: boolean
        }

  @enforce_keys [:kind, :message]
  defexception [:kind, :message, details: %{}, retryable?: false]

  @doc """
  Every kind.

      iex> :timeout in StarweaveImage.Error.kinds()
      true
  """
  @spec kinds() :: [kind]
  def kinds, do: @kinds

  @doc """
  An error of a kind, with its usual `retryable?`.

      iex> StarweaveImage.Error.new(:invalid_request, "steps must be 1 to 200, got 0", %{field: :steps}).details
      %{field: :steps}
  """
  @spec new(kind, String.t(), map) :: t
  def new(kind, message, details \\ %{}) when kind in @kinds do
    %__MODULE__{
      kind: kind,
      message: message,
      details: details,
      retryable?: kind in @retryable
    }
  end
end
